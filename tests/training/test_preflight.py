"""What a machine cannot hold is refused before any work, with what is needed and what fits instead."""

from pathlib import Path

import pytest

from dpt.config.recipe import load_recipe
from dpt.errors import UserError
from dpt.training import preflight

RECIPES = Path(__file__).resolve().parents[2] / "ds_configs"


def test_a_recipe_for_a_cluster_is_refused_with_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: 8 * 2**30)
    recipe = load_recipe(RECIPES / "moe_l2.json")
    with pytest.raises(UserError) as error:
        preflight.preflight(recipe, "pretrain", 1)
    message = str(error.value)
    for part in ("moe_l2.json", "GiB on each of 8 ranks", "data/shards/imagenet_256/train", "1 rank with 8.0 GiB"):
        assert part in message
    assert "quickstart.json fits" in message or "dense_a1.json fits" in message
    assert "\n" not in message


def test_too_little_memory_is_refused_on_the_right_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(RECIPES / "dense_a6.json")
    required = preflight.needs(recipe, "pretrain", 8)
    assert required.ranks == 8
    assert required.bytes_per_rank < 80 * 2**30
    monkeypatch.setattr(preflight, "available_bytes", lambda: required.bytes_per_rank)
    preflight.preflight(recipe, "pretrain", 8)
    monkeypatch.setattr(preflight, "available_bytes", lambda: required.bytes_per_rank - 1)
    with pytest.raises(UserError, match="cannot hold it"):
        preflight.preflight(recipe, "pretrain", 8)


def test_impossible_recipes_are_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: 80 * 2**30)
    with pytest.raises(UserError, match="train_batch_size"):
        preflight.preflight(load_recipe(RECIPES / "quickstart.json", {"train_batch_size": 3}), "pretrain", 2)


def test_upcycling_counts_its_experts() -> None:
    recipe = load_recipe(RECIPES / "upcycle_depth_a2.json")
    assert preflight.needs(recipe, "upcycle", 8).bytes_per_rank > preflight.needs(recipe, "finetune", 8).bytes_per_rank
