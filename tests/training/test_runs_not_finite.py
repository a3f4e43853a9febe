"""Real runs with numbers that are not finite: steps are skipped, windows left out, and what does not end stops the run."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_runs import ACCUMULATED, BF16, STEPS, Runs, ToyRun, asks_for_slow, ep, marked, newest_tensors, zero
from training_toys import records

from dpt.training.checkpoint import find_checkpoints, read_state

_CAREFUL = {"training.max_skipped_steps": 3, "training.checkpoint_every": 4}
POISONED = {  # runs with numbers that are not finite in the first of a step's two micro-batches, on one rank
    **{f"zero{stage}": zero(stage, ACCUMULATED, _CAREFUL) for stage in range(4)},
    "moe_ep2": ep(2, 2, ACCUMULATED, _CAREFUL),
    **{f"bf16_zero{stage}": zero(stage, BF16, ACCUMULATED, _CAREFUL) for stage in range(4)},
    "fp16": zero(1, {"fp16.enabled": True, "fp16.initial_scale_power": 8}, ACCUMULATED, _CAREFUL),
}
SLOW = {"zero2", *(f"bf16_zero{stage}" for stage in (0, 1, 3))}
"""Left to `make test-all`."""
REWOUND = zero(1, ACCUMULATED, _CAREFUL)
"""Samples 45 to 66 are in steps 6 to 9."""


class _Runs(Runs):
    report = ""
    """What the run "failing" said."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> _Runs:
    """All runs, without the slow ones if none of their tests is asked for."""
    runs, left_out = _Runs(tmp_path_factory.mktemp("not_finite")), set() if asks_for_slow(request) else SLOW
    trained = [
        ToyRun(name=f"poisoned_{name}", fields=fields, poison=[4, 5])
        for name, fields in POISONED.items()
        if name not in left_out
    ]
    for name, sigterms in (("rewound_whole", [-1]), ("rewound_parts", [7, 11, -1])):
        for at in sigterms:  # the first comes in the middle of the steps that are not finite
            ends = "finished" if at < 0 else "stopped"
            trained.append(ToyRun(name=name, fields=REWOUND, poisoned_samples=range(45, 67), sigterm_at=at, ends=ends))
    trained.append(ToyRun(name="failing", fields=POISONED["zero1"], poison=range(6, 20), ends=None))
    runs.report = runs.train(2, trained)[-1]
    return runs


@pytest.mark.parametrize("name", [marked(SLOW, name) for name in POISONED])
def test_steps_that_are_not_finite_are_skipped_on_all_ranks(runs: Runs, name: str) -> None:
    found = records(runs(f"poisoned_{name}"))
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert [record["train/skipped_steps"] for record in found] == [0] * 4 + [1] + [2] * (STEPS - 5)
    state = read_state(find_checkpoints(runs(f"poisoned_{name}") / "checkpoints")[0])
    assert (state["skipped"], state["engine"]["updates"]) == (2, STEPS - 2)
    weights = load_file(runs(f"poisoned_{name}") / "weights" / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_too_many_in_a_row_go_back_once_and_then_stop_with_a_report(runs: Runs) -> None:
    said = runs.report
    assert (
        "too many steps in a row up to step 9 were not finite (loss nan), also after going back to the last checkpoint" in said
    )
    report = json.loads((runs("failing") / "failure.json").read_text())
    assert (report["step"], report["loss"]) == (9, "nan")
    assert len(report["sample_keys"]) == 8
    assert len(report["largest_weight_norms"]) == 8
    assert all(norm > 0 for norm in report["largest_weight_norms"].values())
    assert find_checkpoints(runs("failing") / "checkpoints")[0].name.endswith("8")


def test_a_rewind_leaves_out_the_samples_that_led_to_it(runs: Runs) -> None:
    """Samples 45 to 66 are not finite: steps 6, 7 and 8, and step 5 of the course after the rewind to step 4."""
    found = records(runs("rewound_whole"))
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert [record["train/skipped_samples"] for record in found] == [0] * 4 + [32] * (STEPS - 4)
    assert [record["train/skipped_steps"] for record in found] == [0] * 4 + [1] * (STEPS - 4)
    assert [record["train/samples_seen"] for record in found] == [8 * step for step in range(1, STEPS + 1)]
    state = read_state(find_checkpoints(runs("rewound_whole") / "checkpoints")[0])
    assert (state["step"], state["samples_seen"], state["skipped_samples"]) == (STEPS, 8 * STEPS, [[32, 64]])
    assert (state["skipped_in_a_row"], state["engine"]["updates"]) == (0, STEPS - 1)
    assert json.loads((runs("rewound_whole") / "tags.json").read_text()) == {"dpt.skipped_samples": "32 to 63"}


def test_a_rewound_run_that_was_interrupted_is_the_same_bit_for_bit(runs: Runs) -> None:
    whole, parts = newest_tensors(runs("rewound_whole")), newest_tensors(runs("rewound_parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    for first, second in zip(*(records(runs(f"rewound_{kind}")) for kind in ("whole", "parts")), strict=True):
        for key in ("step", "train/loss", "train/learning_rate", "train/samples_seen", "train/skipped_samples"):
            assert first[key] == second[key] or first[key] is second[key] is None
