"""Routing as a run records it: every layer's entropy, every expert's tokens, and heat maps in MLflow."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from training_toys import MOE, ROOT, launch, make_recipe, make_shards, records

from dpt.config.recipe import DptConfig
from dpt.config.sections import ModelConfig
from dpt.models.dit import DiT
from dpt.tracking import Run
from dpt.tracking.read import load_runs
from dpt.training.expert_pictures import ExpertPictures
from dpt.training.records import StepSums
from dpt.training.step import Inputs, Losses, LossModule

PICTURES = ("share_by_class", "share_by_position", "share_by_timestep", "tokens_per_expert")


@pytest.mark.slow
def test_a_run_on_two_ranks_with_spread_experts(tmp_path: Path) -> None:
    """With accumulation and recomputed blocks: each token of a drawn step counts once."""
    recipe = make_recipe(tmp_path / "run.json", [make_shards(tmp_path / "shards")], steps=3)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    fields = {**MOE, "training.ep_size": 2, "training.activation_checkpointing": "true", "sampling.every": 2}
    fields |= {"train_micro_batch_size_per_gpu": 2, "tracking.enabled": "true", "tracking.uri": uri}
    options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    done = launch("deepspeed", 2, str(ROOT / "launchers" / "pretrain.py"), "--ds_config", str(recipe), *options)
    assert done.returncode == 0, done.stdout
    folder = recipe.with_suffix("") / "routing"
    for record in records(folder.parent):
        entropies = [record[f"experts/router_entropy/layer_{layer:02d}"] for layer in range(2)]
        assert all(0 < entropy <= 1 for entropy in entropies)
    (run,) = load_runs(uri)
    found = run.artifacts("pictures")
    for step in (2, 3):  # the cadence, and the end
        assert {f"pictures/routing_{name}_{step:08d}.png" for name in PICTURES} <= set(found)
        with np.load(folder / f"{step:08d}" / "routing.npz") as arrays:
            assert arrays["tokens_per_expert"].sum(axis=1).tolist() == [8 * 4 * 2] * 2  # samples, tokens, experts of a token
            assert arrays["share_by_position"].shape == (2, 2, 2, 4)
            entropy = arrays["token_entropy"]
        assert run.history("experts/router_entropy/layer_01")[step - 1] == (step, pytest.approx(entropy[1], rel=1e-5))
    assert f"routing/{3:08d}/routing.npz" in run.artifacts("routing/00000003")
    for name in ("evenness", "least_evenness", "unused"):
        assert [step for step, _ in run.history(f"experts/{name}")] == [2, 3]
    assert 0 < run.metrics["experts/least_evenness"] <= run.metrics["experts/evenness"] <= 1
    assert not [name for name in run.metrics if name.startswith("experts/tokens")]  # a series for each expert of each layer
    assert run.tags["dpt.model"] == "4 experts, top 2"
    (dataset,) = run.client.get_run(run.mlflow_run_id).inputs.dataset_inputs
    assert dataset.dataset.digest == run.tags["dpt.data_sha256"][:36]


def _inputs(samples: int = 3) -> Inputs:
    torch.manual_seed(0)
    latents, labels = torch.randn(samples, 4, 4, 4), torch.arange(samples)
    return Inputs(latents, labels, labels, None, labels, latents, torch.randn_like(latents), latents, None)


def _module(num_experts: int) -> LossModule:
    model = ModelConfig(hidden_size=32, depth=2, num_heads=2, input_size=4, num_classes=8, num_experts=num_experts)
    config = DptConfig(model=model)
    return LossModule(DiT(config.model), config)


def test_steps_that_are_not_drawn_and_dense_networks_leave_nothing(tmp_path: Path) -> None:
    for drawn, experts in ((False, 4), (True, 0)):
        module = _module(experts)
        pictures = ExpertPictures(module.network, DptConfig(model=module.network.config), tmp_path / "routing")
        pictures.begin(drawn)
        with pictures.watch(_inputs()):
            assert all(block.moe is None or block.moe.observer is None for block in module.network.blocks)
        pictures.draw(1, Run())
    assert not (tmp_path / "routing").exists()


def test_entropies_are_means_over_micro_batches() -> None:
    module = _module(4)
    for block in module.network.blocks:
        torch.nn.init.zeros_(block.moe.gate.weight)  # type: ignore[union-attr]
    sums = StepSums()
    even: Losses = module(*_inputs())
    sums.add(even)
    assert sums.experts()["experts/router_entropy/layer_01"] == pytest.approx(1.0)
    sums.add(even._replace(router_entropy=torch.zeros(2, dtype=torch.float64)))
    assert sums.experts()["experts/router_entropy/layer_00"] == pytest.approx(0.5)
    assert float(even.router_entropy[0]) == pytest.approx(math.log(4))
