"""Runs whose hidden states are aligned: splits, stops, ZeRO stages, experts, precisions; what is kept, exported and refused."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_runs import ACCUMULATED, BF16, BIASES, MOE, Runs, ToyRun, ep, marked, zero
from training_toys import CLASSES, make_shards

from data_tools.encode import main as encode
from data_tools.synthesis.dataset import SynthesisConfig, synthesize
from dpt.models.pretrained import read_weights
from dpt.training.export import checkpoint_weights, export

ALIGNED = {
    "training.self_alignment.weight": 0.2,
    "training.self_alignment.student_block": 1,
    "training.self_alignment.teacher_block": 2,
    "training.self_alignment.ema_decay": 0.5,
    "training.feature_alignment.weight": 0.5,
    "training.feature_alignment.block": 1,
    "training.feature_alignment.channels": 3,
    "training.feature_alignment.projector_width": 16,
    "training.steps": 7,
}
SLOW = {"zero 0", "zero 2"}
"""Left to `make test-all`."""
LOSSES = ("train/loss", "train/self_alignment_loss", "train/feature_alignment_loss", "train/grad_norm")


@pytest.fixture(scope="module")
def runs(toy_runs: Runs) -> Runs:
    """The same run on one rank and on two, under every ZeRO stage, stopped on the way, in bf16, and with experts."""
    shards, other = (
        str(make_shards(toy_runs.folder / name, features=3, encoding={"features": {"name": name, "grid": [4, 4]}}))
        for name in ("normals", "segments")
    )
    fields = ALIGNED | {"data.shards": [shards]}
    depth = ALIGNED | {
        "task": "depth",
        "model.num_conditions": 1,
        "data.shards": [str(encoded_scenes(toy_runs.folder))],
        "data.posterior": "mean",
        "training.steps": 4,
        "training.activation_checkpointing": True,
    }
    mixed = {"data.shards": [shards, str(toy_runs.folder / "shards")], "data.weights": [1, 3]}
    toy_runs.train(
        1,
        ToyRun(name="one", fields=fields | zero(1) | {"training.ema_lengths": [0.1]}),
        ToyRun(name="plain", fields=zero(1) | {"training.steps": 7}),
        ToyRun(name="experts one", fields=fields | zero(1, MOE)),
        ToyRun(name="scenes", fields=depth | zero(1), stage="finetune"),
        ToyRun(name="biases", fields=fields | zero(1, MOE, BIASES) | {"training.steps": 3}),
        ToyRun(name="mixed", fields=ALIGNED | zero(1) | mixed),
    )
    toy_runs.train(
        2,
        ToyRun(name="split", fields=fields | zero(1, ACCUMULATED)),
        ToyRun(name="resumed", fields=fields | zero(1), sigterm_at=5),
        ToyRun(name="resumed", fields=fields | zero(1) | {"training.feature_alignment.weight": 0.0}, ends=None),
        ToyRun(name="resumed", fields=fields | zero(1)),
        ToyRun(name="straight", fields=fields | zero(1)),
        *(ToyRun(name=f"zero {stage}", fields=fields | zero(stage), slow=stage < 3) for stage in (0, 2, 3)),
        ToyRun(name="bf16", fields=fields | zero(2, BF16) | {"training.activation_checkpointing": True}),
        ToyRun(name="experts", fields=fields | ep(2, 2)),
        ToyRun(name="no features", fields=ALIGNED | zero(1), ends=None),
        ToyRun(name="two kinds", fields=ALIGNED | zero(1) | {"data.shards": [shards, other]}, ends=None),
        ToyRun(name="width", fields=fields | zero(1) | {"training.feature_alignment.channels": 4}, ends=None),
    )
    return toy_runs


def encoded_scenes(folder: Path) -> Path:
    """Shards of synthetic scenes with exact normals."""
    synthesize(folder / "scenes", SynthesisConfig(scenes=10, size=32, splits={"train": 1.0}, tasks=("depth",)), workers=1)
    given = ["--dataset", "hypersim", "--root", str(folder / "scenes" / "hypersim"), "--resolution", "32", "--processes", "0"]
    encode([*given, "--features", "normals", "--prompt", "none", "--out", str(folder / "encoded")])
    return folder / "encoded"


@pytest.mark.parametrize("name", [marked(SLOW, name) for name in ("split", "resumed", "zero 0", "zero 2", "zero 3")])
def test_splits_stops_and_stages_change_nothing(runs: Runs, name: str) -> None:
    runs.check_close(name, "one", *LOSSES, rel=5e-4)


def test_a_resumed_run_is_the_same_bit_for_bit(runs: Runs) -> None:
    runs.check_equal("resumed", "straight")


def test_experts_spread_over_ranks_learn_as_on_one(runs: Runs) -> None:
    runs.check_close("experts", "experts one", *LOSSES, rel=2e-3)


def test_it_learns_what_it_is_told(runs: Runs) -> None:
    own, features = (runs.history("one", f"train/{kind}_alignment_loss") for kind in ("self", "feature"))
    assert own[-1] < own[0]
    assert features[-1] < 1.0 < features[0] * 1.2
    for name in ("one", "bf16", "scenes", "biases"):
        assert all(0 < loss < 10 for loss in runs.history(name, "train/self_alignment_loss"))
    assert "train/self_alignment_loss" not in runs.records("plain")[0]
    mixed = runs.history("mixed", "train/feature_alignment_loss")
    assert 0 < mixed[0] < 0.6 * features[0]  # of a quarter of the samples
    assert runs.history("one", "compute/train_macs")[-1] > runs.history("plain", "compute/train_macs")[-1]


def test_projectors_are_in_checkpoints_and_not_in_weights(runs: Runs) -> None:
    names = {name.split(" ")[1] for name in runs.tensors("one")}
    for state in ("master", "exp_avg", "ema0"):
        assert {f"{state}/alignment.self.0.weight", f"{state}/alignment.features.4.bias"} <= names
    for exported in (runs("one") / "weights", export(runs("one"), runs.folder / "averaged", ema_length=0.1)):
        assert not any("alignment" in name for name in load_file(exported / "weights.safetensors"))
        assert read_weights(exported, ema=True).build().config.num_classes == CLASSES
    plain = read_weights(runs("plain") / "weights", ema=False)
    assert plain.state.keys() == checkpoint_weights(runs.checkpoint("one"), ema=False).state.keys()


def test_what_cannot_be_is_refused(runs: Runs) -> None:
    assert "written with other projectors" in runs.ended["resumed"][1]
    assert "the shards hold no features; encode the set with it (--features)" in runs.ended["no features"][0]
    assert "the features are 'segments', in another set 'normals'" in runs.ended["two kinds"][0]
    assert "the features have 3 channels, dpt.training.feature_alignment.channels is 4; set it to 3" in runs.ended["width"][0]
