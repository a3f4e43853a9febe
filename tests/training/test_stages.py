"""First weights: where they come from, fetched once for all ranks, with the time convention that they learnt."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import Hub, used
from gloo import run_ranks

from dpt.config.recipe import DptConfig, Recipe
from dpt.config.sections import DiffusionConfig, ModelConfig, TrainingConfig
from dpt.errors import UserError
from dpt.models.exporting import export_weights
from dpt.training.stages import open_stage
from tests.models.networks import random_model

LEARNT = DiffusionConfig(prediction_type="rectified_flow", time_convention="fraction")


def stage_of(model: ModelConfig, weights: str, diffusion: DiffusionConfig = LEARNT) -> tuple[str, str, list[str]]:
    config = DptConfig(model=model, diffusion=diffusion, training=TrainingConfig(weights=weights))
    stage = open_stage(Recipe(deepspeed={}, dpt=config, path="recipe.json"), "finetune")
    assert stage.start is not None
    return stage.origin, stage.recipe.dpt.training.weights, stage.parents


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with used(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def exported(tmp_path: Path) -> tuple[ModelConfig, Path]:
    model = random_model()
    sections = {"diffusion": dataclasses.asdict(LEARNT), "lineage": {"run_id": "earlier"}}
    return model.config, export_weights(model, tmp_path / "weights", sections=sections)


def test_both_ranks_start_from_one_commit_that_is_fetched_once(hub: Hub, exported: tuple[ModelConfig, Path]) -> None:
    config, folder = exported
    pinned = f"hub:lab/base@{hub.add('lab/base', folder)}"
    assert run_ranks(2, stage_of, config, "hub:lab/base") == [(pinned, pinned, ["earlier"])] * 2
    assert len(hub.downloads()) == 2


def test_weights_of_this_machine_have_no_origin(exported: tuple[ModelConfig, Path]) -> None:
    config, folder = exported
    assert stage_of(config, str(folder)) == ("", str(folder), ["earlier"])


def test_weights_of_another_time_convention_are_refused(exported: tuple[ModelConfig, Path]) -> None:
    config, folder = exported
    with pytest.raises(UserError, match=r'time_convention is "index".*learnt with "fraction"; set it'):
        stage_of(config, str(folder), dataclasses.replace(LEARNT, time_convention="index"))


def test_weights_with_convolutions_are_not_upcycled(tmp_path: Path) -> None:
    model = random_model(mlp_kernel_size=3)
    folder = export_weights(model, tmp_path / "weights", sections={"diffusion": dataclasses.asdict(LEARNT)})
    config = DptConfig(
        model=dataclasses.replace(model.config, mlp_kernel_size=0),
        diffusion=LEARNT,
        training=TrainingConfig(weights=str(folder)),
    )
    with pytest.raises(UserError, match=r"convolutions in its MLPs \(dpt.model.mlp_kernel_size 3\).*trained without"):
        open_stage(Recipe(deepspeed={}, dpt=config, path="recipe.json"), "upcycle")
