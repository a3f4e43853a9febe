"""Real runs with numbers that are not finite: steps are skipped, windows left out, and what does not end stops the run."""

import json

import pytest
from training_runs import ACCUMULATED, BF16, STEPS, Runs, ToyRun, ep, interrupted, marked, zero

_CAREFUL = {"training.max_skipped_steps": 3, "training.checkpoint_every": 4}
_SHORT = _CAREFUL | {"training.steps": 8}
POISONED = {  # runs with numbers that are not finite in the first of a step's two micro-batches, on one rank
    **{f"zero{stage}": zero(stage, ACCUMULATED, _SHORT) for stage in range(4)},
    "moe_ep2": ep(2, 2, ACCUMULATED, _SHORT),
    **{f"bf16_zero{stage}": zero(stage, BF16, ACCUMULATED, _SHORT) for stage in range(4)},
    "fp16": zero(1, {"fp16.enabled": True, "fp16.initial_scale_power": 8}, ACCUMULATED, _SHORT),
}
SLOW = {"zero2", *(f"bf16_zero{stage}" for stage in (0, 1, 3))}
"""Left to `make test-all`."""
REWOUND = zero(1, ACCUMULATED, _CAREFUL)
"""Samples 45 to 66 are in steps 6 to 9."""


@pytest.fixture(scope="module")
def runs(toy_runs: Runs) -> Runs:
    toy_runs.train(
        2,
        *(
            ToyRun(name=f"poisoned_{name}", fields=fields, poison=[4, 5], slow=name in SLOW)
            for name, fields in POISONED.items()
        ),
        ToyRun(name="rewound_whole", fields=REWOUND, poisoned_samples=range(45, 67)),
        # The first signal comes in the middle of the steps that are not finite.
        *interrupted("rewound_parts", REWOUND, 7, 11, poisoned_samples=range(45, 67)),
        ToyRun(name="failing", fields=REWOUND, poison=range(6, 20), ends=None),
    )
    return toy_runs


@pytest.mark.parametrize("name", [marked(SLOW, name) for name in POISONED])
def test_steps_that_are_not_finite_are_skipped_on_all_ranks(runs: Runs, name: str) -> None:
    name = f"poisoned_{name}"
    assert runs.history(name, "step") == list(range(1, 9))
    assert runs.history(name, "train/skipped_steps") == [0] * 4 + [1] + [2] * 3
    state = runs.state(name)
    assert (state["skipped"], state["engine"]["updates"]) == (2, 6)
    assert all(tensor.isfinite().all() for tensor in runs.weights(name).values())


def test_too_many_in_a_row_go_back_once_and_then_stop_with_a_report(runs: Runs) -> None:
    said = "too many steps in a row up to step 9 were not finite (loss nan), even after rewinding to the last checkpoint"
    assert said in runs.ended["failing"][0]
    report = json.loads((runs("failing") / "failure.json").read_text())
    assert (report["step"], report["loss"]) == (9, "nan")
    assert len(report["sample_keys"]) == 8
    assert len(report["largest_weight_norms"]) == 8
    assert all(norm > 0 for norm in report["largest_weight_norms"].values())
    assert runs.checkpoint("failing").name.endswith("8")


def test_a_rewind_leaves_out_the_samples_that_led_to_it(runs: Runs) -> None:
    """Samples 45 to 66 are not finite: steps 6, 7 and 8, and step 5 of the course after the rewind to step 4."""
    name = "rewound_whole"
    assert runs.history(name, "step") == list(range(1, STEPS + 1))
    assert runs.history(name, "train/skipped_samples") == [0] * 4 + [32] * (STEPS - 4)
    assert runs.history(name, "train/skipped_steps") == [0] * 4 + [1] * (STEPS - 4)
    assert runs.history(name, "train/samples_seen") == [8 * step for step in range(1, STEPS + 1)]
    state = runs.state(name)
    assert (state["step"], state["samples_seen"], state["skipped_samples"]) == (STEPS, 8 * STEPS, [[32, 64]])
    assert (state["skipped_in_a_row"], state["engine"]["updates"]) == (0, STEPS - 1)
    assert json.loads((runs(name) / "tags.json").read_text()) == {"dpt.skipped_samples": "32 to 63"}


def test_a_rewound_run_that_was_interrupted_is_the_same_bit_for_bit(runs: Runs) -> None:
    metrics = ("step", "train/loss", "train/learning_rate", "train/samples_seen", "train/skipped_samples")
    runs.check_equal("rewound_parts", "rewound_whole", *metrics)
