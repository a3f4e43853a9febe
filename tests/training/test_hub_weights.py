"""Training from weights of the hub: fetched once for all ranks, and what was read is on record."""

import dataclasses
from pathlib import Path

import pytest
from fake_hub import Hub, used
from gloo import run_ranks

from dpt.config.recipe import DptConfig, Recipe
from dpt.config.sections import DiffusionConfig, ModelConfig, TrainingConfig
from dpt.models.exporting import export_weights
from dpt.training.stages import open_stage
from tests.models.networks import random_model


def stage_of(config: ModelConfig, name: str) -> tuple[str, str, list[str]]:
    training = TrainingConfig(weights=name)
    stage = open_stage(Recipe(deepspeed={}, dpt=DptConfig(model=config, training=training), path="recipe.json"), "finetune")
    assert stage.start is not None
    return stage.origin, stage.recipe.dpt.training.weights, stage.parents


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with used(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def put(hub: Hub, folder: Path) -> tuple[ModelConfig, str]:
    model = random_model()
    sections = {"diffusion": dataclasses.asdict(DiffusionConfig()), "lineage": {"run_id": "earlier"}}
    return model.config, hub.add("lab/base", export_weights(model, folder, sections=sections))


def test_both_ranks_start_from_one_commit_that_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    config, commit = put(hub, tmp_path / "weights")
    pinned = f"hub:lab/base@{commit}"
    assert run_ranks(2, stage_of, config, "hub:lab/base") == [(pinned, pinned, ["earlier"])] * 2
    assert len(hub.downloads()) == 2


def test_weights_of_this_machine_have_no_origin(hub: Hub, tmp_path: Path) -> None:
    config, _ = put(hub, tmp_path / "weights")
    assert stage_of(config, str(tmp_path / "weights")) == ("", str(tmp_path / "weights"), ["earlier"])
