"""What training knows of the codes, prompts and fits of its shards, which its weights then carry."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from training_toys import VAE, make_recipe, make_shards

from dpt.config.recipe import load_recipe
from dpt.config.sections import DiffusionConfig
from dpt.data.codec import load_vae
from dpt.errors import UserError
from dpt.fits import Fit
from dpt.models.dit import DiT
from dpt.models.exporting import export_weights
from dpt.models.pretrained import read_weights
from dpt.target_codes import TARGET_CODES
from dpt.training.data_loader import DataLoader, open_data_loader
from dpt.training.export import weights_sections
from dpt.training.stages import Stage, open_stage

FLOW = {"task": "flow", "model.num_conditions": 2, "model.num_classes": 10}
DEPTH = {"task": "depth", "model.num_conditions": 2, "model.num_classes": 10}
TASKS = pytest.mark.parametrize(("task", "fields", "other"), [("flow", FLOW, "linear_75"), ("depth", DEPTH, "disparity")])


def coded(folder: Path, task: str, code: str) -> Path:
    """Shards that say they are of this code; empty: of before codes were recorded."""
    return encoded(folder, task, {f"{task}_code": code} if code else {})


def encoded(folder: Path, task: str, encoding: dict[str, str]) -> Path:
    return make_shards(folder, task, count=8, shards=1, encoding=encoding)


def opened(recipe_path: Path, *shards: Path, weights: Path | None = None, fields: Mapping[str, Any] = FLOW) -> DataLoader:
    """The data loader as a fine-tuning opens it."""
    make_recipe(recipe_path, shards, weights=str(weights or ""))
    recipe = load_recipe(recipe_path, fields)
    stage = open_stage(recipe, "finetune")
    sizes = {"global_batch_size": 4, "micro_batch_size": 4, "start_sample": 0}
    return open_data_loader(stage.recipe.dpt, pin_memory=False, codes=stage.codes, **sizes)


@TASKS
@pytest.mark.parametrize("learnt", [True, False])
def test_shards_of_another_code_than_the_weights_are_refused(
    tmp_path: Path, task: str, fields: dict[str, Any], other: str, learnt: bool
) -> None:
    first = TARGET_CODES[task][0]
    silent, same = coded(tmp_path / "silent", task, ""), coded(tmp_path / "same", task, other)
    config = load_recipe(make_recipe(tmp_path / "r.json", [silent]), fields).dpt
    sections = {"task": task if learnt else "class", f"{task}_code": other, "diffusion": dataclasses.asdict(DiffusionConfig())}
    weights = export_weights(DiT(config.model), tmp_path / "weights", sections=sections)
    assert opened(tmp_path / "r.json", same, weights=weights, fields=fields).codes == {task: other}
    if not learnt:  # weights of images alone
        assert opened(tmp_path / "r.json", silent, weights=weights, fields=fields).codes == {task: first}
        return
    words = f"{task} is coded as '{first}', in the initial weights as '{other}'; encode the set with --{task}-code {other}"
    with pytest.raises(UserError, match=words):
        opened(tmp_path / "r.json", silent, weights=weights, fields=fields)


@TASKS
def test_two_codes_are_not_mixed(tmp_path: Path, task: str, fields: dict[str, Any], other: str) -> None:
    first = TARGET_CODES[task][0]
    shards = coded(tmp_path / "first", task, first), coded(tmp_path / "other", task, other)
    with pytest.raises(UserError, match=f"'{other}', in another set as '{first}'; encode the set with --{task}-code {first}"):
        opened(tmp_path / "r.json", *shards, fields=fields)


@TASKS
def test_codes_go_from_shards_to_exported_weights(tmp_path: Path, task: str, fields: dict[str, Any], other: str) -> None:
    loader = opened(tmp_path / "r.json", coded(tmp_path / "shards", task, other), fields=fields)
    config = load_recipe(tmp_path / "r.json", fields).dpt
    sections = weights_sections(config, loader.vae, {}, codes=loader.codes)
    export_weights(DiT(config.model), tmp_path / "weights", sections=sections)
    assert read_weights(tmp_path / "weights").sections[f"{task}_code"] == other
    assert f"{'flow' if task == 'depth' else 'depth'}_code" not in sections


def test_a_code_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shards: depth code 'octave' is unknown; it is one of linear, log, disparity\."):
        opened(tmp_path / "r.json", coded(tmp_path / "shards", "depth", "octave"), fields=DEPTH)


def test_weights_carry_the_depth_prompt_of_their_shards(tmp_path: Path) -> None:
    shards = [encoded(tmp_path / prompt, "depth", {"prompt": prompt}) for prompt in ("all_valid", "ground_truth")]
    loader = opened(tmp_path / "r.json", shards[1], fields=DEPTH)
    config = load_recipe(tmp_path / "r.json", DEPTH).dpt
    assert weights_sections(config, loader.vae, {}, depth_prompt=loader.depth_prompt)["depth_prompt"] == "ground_truth"
    with pytest.raises(UserError, match="--prompt ground_truth, another set with all_valid"):
        opened(tmp_path / "r.json", *shards, fields=DEPTH)
    one = {**DEPTH, "model.num_conditions": 1}
    assert opened(tmp_path / "r.json", *shards, fields=one).depth_prompt == ""  # it is shown no prompt


def test_weights_carry_how_pictures_came_to_their_size(tmp_path: Path) -> None:
    shards = [encoded(tmp_path / fit, "depth", {"fit": fit}) for fit in ("stretch", "aspect")]
    loader = opened(tmp_path / "r.json", shards[0], fields=DEPTH)
    recipe = load_recipe(tmp_path / "r.json", DEPTH)
    sections = weights_sections(recipe.dpt, loader.vae, {}, fits=loader.fits)
    export_weights(DiT(recipe.dpt.model), tmp_path / "weights", sections=sections)
    learnt = Stage(name="finetune", recipe=recipe, sections=read_weights(tmp_path / "weights").sections, source="weights").fits
    assert learnt == {"depth": Fit(how="stretch", resolution=32)}
    with pytest.raises(UserError, match="encoded with --fit aspect, another set for depth with stretch; encode both with"):
        opened(tmp_path / "r.json", *shards, fields=DEPTH)
    silent = encoded(tmp_path / "silent", "depth", {})  # of before it was recorded
    assert opened(tmp_path / "r.json", silent, fields=DEPTH).fits == {}


def test_a_vae_other_than_that_of_the_shards_is_refused(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", "depth", count=8, shards=1, vae=dataclasses.replace(VAE, name="somebody/vae"))
    with pytest.raises(UserError, match=r'made by VAE "somebody/vae", dpt\.data\.vae is "embedded", which is another one'):
        opened(tmp_path / "r.json", shards, fields=DEPTH)
    assert opened(tmp_path / "r.json", shards, fields={**DEPTH, "data.vae": "somebody/vae"}).vae.name == "somebody/vae"
    vae = dataclasses.replace(VAE, name="a copy", sha256=load_vae().sha256)  # the same one by another name
    assert opened(tmp_path / "r.json", make_shards(tmp_path / "copy", "depth", count=8, vae=vae), fields=DEPTH).vae == vae
