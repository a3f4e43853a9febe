"""The global batch over ranks: micro-batches as large as allowed, and refusals that are true."""

import json
from pathlib import Path

import pytest

from dpt.config.checks import batch_split, check_recipe, split_note, trained_model
from dpt.config.presets import preset_values
from dpt.config.recipe import load_recipe
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.scaling.cluster import Cluster, best_layout
from dpt.training.engine import deepspeed_config
from tests.config.test_shipped_recipes import RECIPES, stage_of

RANKS = (1, 2, 4, 8, 16, 32, 64)
KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_split_or_refused_for_a_true_reason(path: Path) -> None:
    """The truth is taken from the file, not from what is tested."""
    written = json.loads(path.read_text())
    batch, limit = written["train_batch_size"], written.get("train_micro_batch_size_per_gpu", written["train_batch_size"])
    ep_size = written["dpt"]["training"].get("ep_size", 1)
    recipe, stage = load_recipe(path), stage_of(path)
    assert trained_model(recipe, stage).num_experts % ep_size == 0
    for ranks in RANKS:
        reasons = [f"train_batch_size {batch} is not a multiple of {ranks} ranks;"] * (batch % ranks > 0)
        reasons += [f"dpt.training.ep_size {ep_size} does not divide {ranks} rank"] * (ranks % ep_size > 0)
        if reasons:
            with pytest.raises(UserError) as refusal:
                check_recipe(recipe, ranks, stage)
            assert any(reason in str(refusal.value) for reason in reasons)
            continue
        check_recipe(recipe, ranks, stage)
        total, micro, accumulation = batch_split(recipe, ranks)
        assert (total, total) == (batch, micro * ranks * accumulation)
        assert micro <= limit
        assert not [n for n in range(micro + 1, limit + 1) if (batch // ranks) % n == 0]
        config = deepspeed_config(recipe, ranks, numel=1)
        assert tuple(config[key] for key in KEYS) == (total, micro, accumulation)


def test_the_documented_command_on_two_nodes() -> None:
    """docs/cluster.md: moe_l2.json on two nodes of eight."""
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "moe_l2"))
    assert batch_split(recipe, 16) == (256, 16, 1)
    assert split_note(recipe, 16) == (
        "Micro-batches of 16 instead of 32 (train_micro_batch_size_per_gpu, the most allowed): 256 samples on 16 ranks are 16 "
        "each, 1 x 16."
    )
    assert split_note(recipe, 8) == split_note(recipe, 1) == ""


@pytest.mark.parametrize(
    ("keys", "ranks", "split"),
    [
        ((8, None, None), 2, (8, 4, 1)),
        ((8, 2, None), 2, (8, 2, 2)),
        ((None, 3, None), 4, (12, 3, 1)),
        ((None, 3, 2), 4, (24, 3, 2)),
        ((8, None, 4), 1, (8, 2, 4)),
        ((16, 8, 4), 2, (16, 2, 4)),
        ((60, 8, None), 2, (60, 6, 5)),
        ((74, 32, None), 2, (74, 1, 37)),
    ],
)
def test_batch_split(keys: tuple[int | None, ...], ranks: int, split: tuple[int, int, int]) -> None:
    given = {key: value for key, value in zip(KEYS, keys, strict=True) if value is not None}
    assert batch_split(load_recipe(None, given), ranks) == split


@pytest.mark.parametrize(
    ("keys", "ranks", "words"),
    [
        ((6, None, None), 4, "train_batch_size 6 is not a multiple of 4 ranks; change one of them (4 or 8 samples would do)."),
        ((2, None, None), 4, "(4 samples would do)."),
        ((7, None, 2), 1, "train_batch_size 7 is not a multiple of 1 rank x gradient_accumulation_steps 2;"),
        (
            (64, 8, 2),
            2,
            "gradient_accumulation_steps 2 makes micro-batches of 16 on 2 ranks, above train_micro_batch_size_per_gpu 8;",
        ),
        ((None, None, None), 1, "train_batch_size is missing"),
        ((0, None, None), 1, "train_batch_size is 0"),
        ((8, 2.5, None), 1, "train_micro_batch_size_per_gpu is 2.5"),
        ((8, None, True), 1, "gradient_accumulation_steps is True"),
    ],
)
def test_what_cannot_be_split_is_one_sentence(keys: tuple[object, ...], ranks: int, words: str) -> None:
    given = {key: value for key, value in zip(KEYS, keys, strict=True) if value is not None}
    with pytest.raises(UserError) as refusal:
        batch_split(load_recipe(None, given), ranks)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("ranks", "batch"), [(8, 256), (16, 256), (24, 1536), (64, 1024)])
def test_planned_layouts_are_split_as_planned(ranks: int, batch: int) -> None:
    """`dpt cluster --recipes` prints fields whose split is the layout's own."""
    layout = best_layout(ModelConfig(**preset_values("L/2-8E2A")), ranks, batch, Cluster()).layout
    fields = {key: value for key, value in layout.recipe().items() if key != "dpt"}
    assert batch_split(load_recipe(None, fields), ranks) == (batch, layout.micro_batch_size, layout.accumulation)
