"""Real runs, interrupted and continued: the same bit for bit on the same layout, close on others, safe at damaged ends."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import BF16, BIASES, STEPS, Runs, ToyRun, ep, interrupted, marked, zero
from training_toys import MOE

from dpt.errors import UserError
from dpt.models.pretrained import read_weights
from dpt.training.checkpoint import CheckpointReader, check_file, read_state
from dpt.training.export import checkpoint_weights, export

SHORT = {"training.steps": 9}
RESUMED = {  # runs that must be the same bit for bit whether they were interrupted or not
    "zero0": zero(0, SHORT),
    "zero1": zero(1),
    "zero2": zero(2, SHORT),
    "zero3": zero(3, SHORT),
    "moe_ep2": ep(1, 2, BIASES, SHORT),
    "bf16": zero(1, BF16, SHORT),
    "fp16": zero(1, {"fp16.enabled": True, "fp16.initial_scale_power": 26, "fp16.loss_scale_window": 4}, SHORT),
}
SLOW = {"zero0", "zero2", "bf16", "dense"}
"""Left to `make test-all`."""
ROADS = {  # runs taken from 1 to 2, 4 and 2 ranks
    "dense": [zero(1), zero(2), zero(3), zero(1)],
    "moe": [zero(1, MOE), ep(1, 2), ep(2, 4), zero(3, MOE)],
}
LEGS = (1, 2, 4, 2)
"""Ranks of each quarter of a road."""


@pytest.fixture(scope="module")
def runs(toy_runs: Runs) -> Runs:
    straight = [ToyRun(name=f"straight_{name}", fields=road[0], slow=name in SLOW) for name, road in ROADS.items()]
    others = {0: straight, len(LEGS) - 1: _interrupted()}
    for leg, ranks in enumerate(LEGS):
        at = STEPS // len(LEGS) * (leg + 1) if leg < len(LEGS) - 1 else -1
        road = [ToyRun(name=f"road_{name}", fields=road[leg], sigterm_at=at, slow=name in SLOW) for name, road in ROADS.items()]
        toy_runs.train(ranks, *road, *others.get(leg, []))
    return toy_runs


def _interrupted() -> list[ToyRun]:
    """Runs whole and in two parts; one that begins anew at a damaged end; one that then keeps other averages."""
    runs = []
    for name, fields in RESUMED.items():
        runs.append(ToyRun(name=f"{name}_whole", fields=fields, slow=name in SLOW))
        runs += interrupted(f"{name}_parts", fields, 7, slow=name in SLOW)
    saved = zero(1, {"training.checkpoint_every": 4})
    runs += [ToyRun(name="damaged", fields=saved), ToyRun(name="damaged", fields=saved, damage=True)]
    runs.append(ToyRun(name="averages", fields=zero(1), sigterm_at=7))
    runs.append(ToyRun(name="averages", fields=zero(1, {"training.ema_decays": [0.5, 0.7]})))
    return runs


@pytest.mark.parametrize("name", [marked(SLOW, name) for name in RESUMED])
def test_on_the_same_layout_a_continued_run_is_the_same_bit_for_bit(runs: Runs, name: str) -> None:
    metrics = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "train/samples_seen")
    runs.check_equal(f"{name}_parts", f"{name}_whole", *metrics)
    states = [runs.state(f"{name}_{kind}") for kind in ("whole", "parts")]
    assert states[0]["engine"] == states[1]["engine"]
    assert states[0]["samples_seen"] == states[1]["samples_seen"] == 8 * (STEPS if name == "zero1" else 9)


@pytest.mark.parametrize("name", [marked(SLOW, name) for name in ROADS])
def test_on_other_layouts_a_continued_run_stays_close(runs: Runs, name: str) -> None:
    runs.check_close(f"road_{name}", f"straight_{name}", rel=2e-4)
    state = runs.state(f"road_{name}")
    assert (state["step"], state["layout"]["world_size"], state["samples_seen"]) == (STEPS, 2, 8 * STEPS)
    found, expected = runs.weights(f"road_{name}"), runs.weights(f"straight_{name}")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize("name", [marked(SLOW, name) for name in ROADS])
def test_moments_and_averages_are_carried_over(runs: Runs, name: str) -> None:
    """After all steps on one rank, and on 1, 2, 4 and 2 with other stages."""
    checkpoints = [runs.checkpoint(f"{kind}_{name}") for kind in ("road", "straight")]
    road, straight = (read_state(checkpoint) for checkpoint in checkpoints)
    assert road["states"] == straight["states"] == ["master", "exp_avg", "exp_avg_sq", "ema0", "ema1"]
    assert road["parameters"] == straight["parameters"]
    assert road["engine"]["updates"] == straight["engine"]["updates"] == STEPS
    for kind in road["states"]:
        found, expected = (
            torch.cat([reader.whole(kind, key, shape).flatten() for key, shape in road["parameters"].items()])
            for reader in (CheckpointReader(checkpoints[0], road), CheckpointReader(checkpoints[1], straight))
        )
        assert (found - expected).norm() < 1e-3 * expected.norm(), kind


def test_a_damaged_last_checkpoint_is_made_anew(runs: Runs) -> None:
    checkpoint = runs.checkpoint("damaged")
    assert checkpoint.name.endswith(str(STEPS))
    for name, entry in read_state(checkpoint)["files"].items():
        check_file(checkpoint / name, entry)
    runs.check_equal("damaged", "zero1_whole")


def test_averages_are_taken_up_by_their_decay(runs: Runs) -> None:
    """After 7 steps with averages of decays 0.9 and 0.5, the rest with 0.5 and 0.7."""
    kept, changed = (runs.checkpoint(name) for name in ("zero1_whole", "averages"))
    found, expected = (checkpoint_weights(one, ema=True, ema_decay=0.5).state for one in (changed, kept))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain, new = checkpoint_weights(changed, ema=False).state, checkpoint_weights(changed, ema=True, ema_decay=0.7).state
    distances = [
        float(torch.stack([(average[name] - plain[name]).norm() for name in plain]).norm()) for average in (found, new)
    ]
    assert 0 < distances[0] < distances[1]


def test_any_checkpoint_exports_and_is_a_start(runs: Runs, tmp_path: Path) -> None:
    run = runs("road_moe")
    out = export(run, tmp_path / "weights")
    exported, kept = (load_file(folder / "weights.safetensors") for folder in (out, run / "weights"))
    assert exported.keys() == kept.keys()
    assert all(torch.equal(exported[key], kept[key]) for key in kept)
    config = json.loads((out / "config.json").read_text())
    assert config["lineage"]["step"] == STEPS
    assert config["lineage"]["samples_seen"] == 8 * STEPS
    assert config["lineage"]["train_macs"] > 0
    assert config["vae"]["sha256"] == "0" * 64
    averaged, plain = read_weights(out), checkpoint_weights(runs.checkpoint("road_moe"), ema=True)
    assert averaged.averaged
    assert all(torch.equal(averaged.state[key], plain.state[key]) for key in plain.state)
    averaged.build()
    second = read_weights(export(run, tmp_path / "second", ema_decay=0.5))
    assert any(not torch.equal(second.state[key], averaged.state[key]) for key in second.state)
    with pytest.raises(UserError, match=r"decays \[0.9, 0.5\], none of 0.7"):
        export(run, tmp_path / "third", ema_decay=0.7)
