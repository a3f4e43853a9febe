"""What training knows of the codes and prompts of its shards, which its weights then carry."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from training_toys import make_recipe, make_shards

from dpt.config.recipe import load_recipe
from dpt.config.sections import DiffusionConfig
from dpt.data.manifest import read_manifest, write_manifest
from dpt.errors import UserError
from dpt.models.dit import DiT
from dpt.models.pretrained import export_weights
from dpt.training.data_loader import DataLoader, open_data_loader
from dpt.training.export import weights_sections
from dpt.training.stages import open_stage

FLOW = {"task": "flow", "model.num_conditions": 2, "model.num_classes": 10}


def coded(folder: Path, code: str) -> Path:
    """Flow shards that say they are of this code; empty: of before codes were recorded."""
    return encoded(folder, "flow", {"flow_code": code} if code else {})


def encoded(folder: Path, task: str, encoding: dict[str, str]) -> Path:
    make_shards(folder, task, count=8, shards=1)
    write_manifest(folder, dataclasses.replace(read_manifest(folder), encoding=encoding))
    return folder


def opened(recipe_path: Path, *shards: Path, weights: Path | None = None, fields: Mapping[str, Any] = FLOW) -> DataLoader:
    """The data loader as a fine-tuning opens it."""
    make_recipe(recipe_path, shards, weights=str(weights or ""))
    recipe = load_recipe(recipe_path, fields)
    stage = open_stage(recipe, "finetune")
    sizes = {"global_batch_size": 4, "micro_batch_size": 4, "start_sample": 0}
    return open_data_loader(stage.recipe.dpt, pin_memory=False, flow_code=stage.flow_code, **sizes)


@pytest.mark.parametrize("task", ["flow", "class"])
def test_flow_shards_of_another_code_than_the_weights_are_refused(tmp_path: Path, task: str) -> None:
    log, linear = coded(tmp_path / "log", ""), coded(tmp_path / "linear", "linear_75")
    config = load_recipe(make_recipe(tmp_path / "r.json", [log]), FLOW).dpt
    sections = {"task": task, "flow_code": "linear_75", "diffusion": dataclasses.asdict(DiffusionConfig())}
    weights = export_weights(DiT(config.model), tmp_path / "weights", sections=sections)
    assert opened(tmp_path / "r.json", linear, weights=weights).flow_code == "linear_75"
    if task == "class":  # these have learnt no flow
        assert opened(tmp_path / "r.json", log, weights=weights).flow_code == "log"
        return
    with pytest.raises(UserError, match="'log', in the initial weights as 'linear_75'; encode the set with --flow-code linear"):
        opened(tmp_path / "r.json", log, weights=weights)


def test_two_flow_codes_are_not_mixed(tmp_path: Path) -> None:
    shards = coded(tmp_path / "log", "log"), coded(tmp_path / "linear", "linear_75")
    with pytest.raises(UserError, match="'linear_75', in another set as 'log'"):
        opened(tmp_path / "r.json", *shards)


def test_weights_carry_the_depth_prompt_of_their_shards(tmp_path: Path) -> None:
    shards = [encoded(tmp_path / prompt, "depth", {"prompt": prompt}) for prompt in ("all_valid", "ground_truth")]
    fields = {"task": "depth", "model.num_conditions": 2, "model.num_classes": 10}
    loader = opened(tmp_path / "r.json", shards[1], fields=fields)
    config = load_recipe(tmp_path / "r.json", fields).dpt
    assert weights_sections(config, loader.vae, {}, depth_prompt=loader.depth_prompt)["depth_prompt"] == "ground_truth"
    with pytest.raises(UserError, match="--prompt ground_truth, another set with all_valid"):
        opened(tmp_path / "r.json", *shards, fields=fields)
    one = {**fields, "model.num_conditions": 1}
    assert opened(tmp_path / "r.json", *shards, fields=one).depth_prompt == ""  # it is shown no prompt
