"""Real runs that keep power-function averages: any length is made of them, whatever happened to the run."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import ACCUMULATED, BF16, Runs, ToyRun, interrupted, marked, zero

from dpt import cli
from dpt.errors import UserError
from dpt.models.pretrained import read_config, read_weights
from dpt.training.averages import exponent
from dpt.training.checkpoint import CheckpointReader, find_checkpoints, kept_lengths, rank_file, read_state
from dpt.training.export import export
from dpt.training.rebuilding import rebuild

STEPS = 16
KEPT = {"training.steps": STEPS, "training.ema_lengths": "0.05,0.1", "training.ema_snapshots": 8}
OTHERS = KEPT | {"training.ema_lengths": "0.07,0.15"}
LAYOUTS = {**{f"zero{stage}": zero(stage) for stage in (1, 2, 3)}, "bf16": zero(1, BF16)}
SLOW = {"zero2", "bf16"}
"""Left to `make test-all`."""
REWOUND = zero(1, ACCUMULATED, {"training.max_skipped_steps": 3, "training.checkpoint_every": 4})
"""Samples 45 to 66 are in steps 6 to 9."""


@pytest.fixture(scope="module")
def runs(toy_runs: Runs) -> Runs:
    late = LAYOUTS["zero1"] | {"training.steps": STEPS}
    toy_runs.train(
        2,
        *(ToyRun(name=f"{name}_kept", fields=fields | KEPT, slow=name in SLOW) for name, fields in LAYOUTS.items()),
        *(ToyRun(name=f"{name}_others", fields=fields | OTHERS, slow=name in SLOW) for name, fields in LAYOUTS.items()),
        *interrupted("zero3_parts", LAYOUTS["zero3"] | KEPT, 10, 13, slow=True),  # a snapshot is due at step 10
        ToyRun(name="rewound_kept", fields=REWOUND | KEPT, poisoned_samples=range(45, 67)),
        ToyRun(name="rewound_others", fields=REWOUND | OTHERS, poisoned_samples=range(45, 67)),
        ToyRun(name="late", fields=late, sigterm_at=7),
        ToyRun(name="late", fields=late | KEPT, ends=None),
    )
    return toy_runs


@pytest.mark.parametrize("name", [marked(SLOW, name) for name in (*LAYOUTS, "rewound")])
def test_an_average_made_afterwards_is_the_one_that_was_tracked(runs: Runs, name: str) -> None:
    made_of, tracked = runs.checkpoint(f"{name}_kept"), runs.checkpoint(f"{name}_others")
    state = read_state(tracked)
    reader = CheckpointReader(tracked, state)
    for length, kept in kept_lengths(state).items():
        averages, residual = rebuild(made_of, length)
        assert residual < 0.05
        for key, shape in state["parameters"].items():
            expected = reader.whole(kept, key, shape)
            assert (averages[key] - expected).norm() <= 1e-3 * expected.norm() + 1e-6, (length, key)


def test_they_weigh_the_runs_updates_and_nothing_from_before(runs: Runs) -> None:
    """The longest one lies between the last weights and the others: its length is seen in the weights."""
    state = runs.state("zero1_kept")
    reader = CheckpointReader(runs.checkpoint("zero1_kept"), state)
    name = "blocks.0.attn.qkv.weight"
    master, short, long = (reader.whole(kind, name, state["parameters"][name]) for kind in ("master", "power0", "power1"))
    assert 0 < (short - master).norm() < (long - master).norm()
    assert exponent(0.05) > exponent(0.1)


@pytest.mark.slow
def test_an_interrupted_run_keeps_the_same_snapshots_bit_for_bit(runs: Runs) -> None:
    whole, parts = runs("zero3_kept"), runs("zero3_parts")
    steps = [path.name for path in find_checkpoints(whole / "averages")]
    assert steps == [path.name for path in find_checkpoints(parts / "averages")]
    assert len(steps) == 8
    for step in steps:
        for rank in range(2):
            one, other = (load_file(run / "averages" / step / rank_file(rank)) for run in (whole, parts))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
    runs.check_equal("zero3_parts", "zero3_kept")


def test_a_run_cannot_begin_to_keep_them_halfway(runs: Runs) -> None:
    refusal = "keeps no average of the relative length 0.05 (dpt.training.ema_lengths), which must be kept from a run's start"
    assert refusal in runs.ended["late"][1]


def test_the_command_writes_weights_that_say_their_length(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = runs("zero3_kept")
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--ema-length", "0.07"]) == 0
    assert "averaged with the relative length 0.07; its profile is matched to" in capsys.readouterr().out
    lineage = read_config(tmp_path / "out")["lineage"]
    assert (lineage["ema_length"], lineage["step"]) == (0.07, STEPS)
    averages, residual = rebuild(runs.checkpoint("zero3_kept"), 0.07)
    assert lineage["ema_residual"] == residual
    weights = read_weights(tmp_path / "out", ema=True)
    assert weights.averaged
    assert all(torch.equal(weights.state[name], tensor) for name, tensor in averages.items())
    plain = read_weights(run / "weights", ema=False).state
    assert all(torch.equal(tensor, plain[name]) for name, tensor in read_weights(tmp_path / "out", ema=False).state.items())


def test_what_cannot_be_made_is_refused_in_a_sentence(runs: Runs, tmp_path: Path) -> None:
    kept = runs("zero1_kept")
    with pytest.raises(UserError, match=r"--ema-length 0\.3 must be above 0 and at most 0\.28"):
        export(kept, tmp_path / "out", ema_length=0.3)
    run = shutil.copytree(kept, tmp_path / "run")
    damaged = find_checkpoints(run / "averages")[3]
    path = damaged / rank_file(1)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=rf"rank_00001.safetensors is damaged \(.*\); remove {damaged} to do without it"):
        export(run, tmp_path / "out", ema_length=0.07)
    shutil.rmtree(damaged)
    config = read_config(export(run, tmp_path / "out", ema_length=0.07))
    assert config["lineage"]["ema_residual"] > rebuild(runs.checkpoint("zero1_kept"), 0.07)[1]
    for old in find_checkpoints(run / "averages")[2:]:
        shutil.rmtree(old)
    with pytest.raises(UserError, match=r"1 snapshots of the lengths \[0\.05, 0\.1\] come no nearer than \d+%"):
        export(run, tmp_path / "out", ema_length=0.25)
    with pytest.raises(UserError, match=r"keeps no power-function averages; set dpt\.training\.ema_lengths"):
        export(runs("late"), tmp_path / "out", ema_length=0.1)
    with pytest.raises(SystemExit):
        cli.main(["export", str(run), str(tmp_path / "o"), "--ema-length", "0.1", "--ema-decay", "0.9"])
