"""Every recipe in ds_configs/ loads, is possible on the hardware that it names, and says which hardware that is."""

import re
from pathlib import Path

import pytest

from dpt.config.checks import batch_split, check_recipe
from dpt.config.recipe import load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_possible_on_its_hardware(path: Path) -> None:
    recipe = load_recipe(path)
    ranks = re.match(r"(?:CPU, )?(\d+) (?:GPUs?|process(?:es)?)\b", recipe.dpt.hardware)
    assert ranks, "hardware must begin with the number of GPUs or processes"
    check_recipe(recipe, int(ranks[1]), stage=path.stem.split("_")[0])
    total, micro, accumulation = batch_split(recipe, int(ranks[1]))
    assert total == micro * accumulation * int(ranks[1])
    assert recipe.dpt.data.shards
    assert recipe.dpt.tracking.run_name
