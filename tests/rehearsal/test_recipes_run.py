"""Every recipe in ds_configs/ trains, checkpoints, resumes and exports: in small, all else as shipped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rehearsals import checkpoints, rehearse
from shrinking import RECIPES, SIZES, prepare_places, rehearsed_ranks, shrink, stage_of

from dpt.config.recipe import Recipe, load_recipe
from dpt.models.pretrained import read_weights
from dpt.tracking.run import flatten

QUICK = {
    *("cpu_zero0", "cpu_zero2", "cpu_zero3", "cpu_ep2", "cpu_ep4"),
    *("dense_a1", "finetune_amodal", "quickstart_best", "quickstart_upcycle", "upcycle_generalist"),
}
"""Of `make test`; the others are left to `make test-all`."""


def _rehearse(path: Path, folder: Path, *, compiler: str) -> tuple[Recipe, Path]:
    recipe = load_recipe(path)
    fields = prepare_places(path, folder)
    rehearse(recipe, stage_of(path.stem), rehearsed_ranks(recipe), fields, compiler=compiler)
    return recipe, folder / "run"


def _check(recipe: Recipe, run: Path) -> None:
    """What a run leaves: two checkpoints, records of four steps, pictures and weights that a network can be made of."""
    config = recipe.dpt
    assert checkpoints(run) == ["step_00000002", "step_00000004"]
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 4
    assert records[-1]["train/loss"] > 0
    assert records[-1]["train/skipped_steps"] == 0
    for ema in (True, False):
        weights = read_weights(run / "weights", ema=ema)
        assert weights.averaged is ema
        assert all(t.isfinite().all() for t in weights.state.values())
    network = weights.build()
    size = network.config.input_size
    labels = torch.full((2,), network.config.num_classes - 1)
    out = network(torch.zeros(2, network.in_channels, size, size), torch.tensor([3, 900]), labels)
    assert out.prediction.isfinite().all()
    if config.task == "class":
        assert [p.name for p in sorted((run / "pictures").iterdir())] == ["classes_00000002.png", "classes_00000004.png"]
    if network.config.num_experts:
        assert (run / "routing" / "00000004" / "routing.npz").is_file()


def _marked(path: Path) -> Any:
    return pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("path", [_marked(path) for path in RECIPES])
def test_recipe_is_rehearsed(path: Path, tmp_path: Path) -> None:
    """Where it compiles, blocks are traced with their backward passes, but run by PyTorch's own operators ("aot_eager"): that
    finds what cannot be compiled, and generated code takes a CPU minutes to build."""
    _check(*_rehearse(path, tmp_path, compiler="aot_eager"))


@pytest.mark.slow
def test_recipe_is_rehearsed_with_generated_code(tmp_path: Path) -> None:
    path = next(path for path in RECIPES if path.stem == "dense_a1")
    _check(*_rehearse(path, tmp_path, compiler="inductor"))


def test_every_shape_is_rehearsed_in_make_test() -> None:
    """ZeRO stage, precision and ranks that share experts; and every kind of training."""

    def shapes(paths: list[Path]) -> set[tuple[int, str, int]]:
        recipes = [load_recipe(path) for path in paths]
        return {(recipe.zero_stage, recipe.precision, recipe.dpt.training.ep_size) for recipe in recipes}

    quick = [path for path in RECIPES if path.stem in QUICK]
    assert len(quick) == len(QUICK)
    assert shapes(quick) == shapes(RECIPES)
    assert {stage_of(path.stem) for path in quick} == {"pretrain", "finetune", "upcycle"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shrinking_changes_sizes_and_places_alone(path: Path) -> None:
    recipe = load_recipe(path)
    fields = shrink(recipe, shards=["x"] * len(recipe.dpt.data.shards), weights="w", output_dir="o", steps=2)
    before, after = (flatten(r.to_dict()) for r in (recipe, load_recipe(path, fields)))
    changed = {name.removeprefix("dpt.") for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= set(SIZES)
