"""Real runs, started by DeepSpeed's launcher: the same recipe gives the same losses and weights however it is spread.

Each number of ranks is launched once and does all of its runs, since starting processes takes longer than the runs.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import MOE, make_recipe, make_shards, records, train_several

DENSE_ZERO = {f"dense_zero{stage}": {"zero_optimization.stage": stage} for stage in range(4)}
MOE_ZERO = {f"moe_zero{stage}": {"zero_optimization.stage": stage, **MOE} for stage in range(4)}
PLAIN: dict[str, dict[str, Any]] = {**DENSE_ZERO, **MOE_ZERO}
ACCUMULATED = {"train_micro_batch_size_per_gpu": 2, "training.balance_loss_weight": 0.0}


def _ep(stage: int, ep_size: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization.stage": stage, "training.ep_size": ep_size, **MOE, **more}


RUNS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        **PLAIN,
        "dense_accumulated": {"zero_optimization.stage": 1, **ACCUMULATED},
        "moe_accumulated": {"zero_optimization.stage": 1, **MOE, **ACCUMULATED},
        "dense_checkpointing": {"zero_optimization.stage": 2, "training.activation_checkpointing": True},
        "moe_biases": _ep(1, 1, **{"model.router_bias_balancing": True}),
    },
    2: {
        **PLAIN,
        "dense_accumulated": {"zero_optimization.stage": 2, **ACCUMULATED},
        "moe_accumulated": _ep(2, 2, **ACCUMULATED),
        "moe_zero1_ep2": _ep(1, 2),
        "moe_zero2_ep2": _ep(2, 2),
        "moe_checkpointing_ep2": _ep(1, 2, **{"training.activation_checkpointing": True}),
        "moe_biases": _ep(1, 2, **{"model.router_bias_balancing": True}),
        "dense_offload": {"zero_optimization.stage": 2, "zero_optimization.offload_optimizer": {"device": "cpu"}},
        "dense_zero1_bf16": {"zero_optimization.stage": 1, "bf16.enabled": True},
        "dense_zero3_bf16": {"zero_optimization.stage": 3, "bf16.enabled": True},
        "moe_zero2_ep2_bf16": _ep(2, 2, **{"bf16.enabled": True}),
        "dense_zero0_bf16": {"zero_optimization.stage": 0, "bf16.enabled": True},
        "moe_zero1_ep2_fp16": _ep(1, 2, **{"fp16.enabled": True, "fp16.initial_scale_power": 12}),
    },
    4: {
        "dense_zero1": {"zero_optimization.stage": 1},
        "dense_zero2": {"zero_optimization.stage": 2},
        "dense_zero3": {"zero_optimization.stage": 3},
        "dense_accumulated": {"zero_optimization.stage": 3, "train_micro_batch_size_per_gpu": 1},
        "moe_zero1_ep2": _ep(1, 2),
        "moe_zero1_ep4": _ep(1, 4),
        "moe_zero2_ep2": _ep(2, 2),
        "moe_zero2_ep4": _ep(2, 4),
        "moe_biases": _ep(2, 4, **{"model.router_bias_balancing": True}),
    },
}


class World:
    """Where the runs are, and each launch, done when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shards = make_shards(folder / "shards")
        self.recipe = make_recipe(folder / "recipe.json", [shards])
        self._launched: set[int] = set()

    def run(self, ranks: int, name: str) -> Path:
        """Folder of a run of RUNS."""
        if ranks not in self._launched:
            self._launched.add(ranks)
            runs = [
                {
                    "stage": "pretrain",
                    "recipe": str(self.recipe),
                    "fields": {**fields, "training.output_dir": str(self.folder / f"{ranks}_{run}")},
                }
                for run, fields in RUNS[ranks].items()
            ]
            ended = train_several(ranks, self.folder / f"runs_{ranks}.json", runs)
            assert dict(zip(RUNS[ranks], ended, strict=True)) == dict.fromkeys(RUNS[ranks], "finished")
        return self.folder / f"{ranks}_{name}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("training"))


def _reference(name: str) -> str:
    kind = name.split("_")[0]
    return {"dense_accumulated": "dense_zero0", "moe_accumulated": name, "moe_biases": name}.get(name, f"{kind}_zero0")


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, runs in RUNS.items() for name in runs])
def test_losses_and_weights_are_those_of_one_rank(world: World, ranks: int, name: str) -> None:
    run, reference = world.run(ranks, name), world.run(1, _reference(name))
    half = name.endswith("16")
    found, expected = records(run), records(reference)
    assert [record["step"] for record in found] == list(range(1, 21))
    quantities = ["loss", "grad_norm", "router_z_loss"]
    if "accumulated" not in name:  # each micro-batch balances its own tokens
        quantities.append("load_balancing_loss")
    for key in (f"train/{quantity}" for quantity in quantities):
        if key in expected[0]:
            values, wanted = ([record[key] for record in lines] for lines in (found, expected))
            assert values == pytest.approx(wanted, rel=3e-2 if half else 2e-4, abs=1e-5), key
    weights, wanted_weights = (load_file(folder / "weights" / "weights.safetensors") for folder in (run, reference))
    assert weights.keys() == wanted_weights.keys()
    if half:
        difference, size = (
            torch.stack([tensor.norm() for tensor in tensors]).norm()
            for tensors in ([weights[key] - wanted_weights[key] for key in weights], list(wanted_weights.values()))
        )
        assert difference < 0.02 * size
        return
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, wanted_weights[key], rtol=1e-3, atol=2e-4, msg=key)


def test_training_learns_and_averages_lag(world: World) -> None:
    run = world.run(1, "dense_zero1")
    losses = [record["train/loss"] for record in records(run)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    weights = load_file(run / "weights" / "weights.safetensors")
    assert any(name.startswith("ema.") for name in weights)
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(weights[name], weights[f"ema.{name}"])
    assert os.path.getsize(run / "records.jsonl") > 0
