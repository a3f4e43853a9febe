"""Every recipe in ds_configs/ trains, checkpoints, resumes and exports: in small, all else as shipped."""

import json
from pathlib import Path

import pytest
import torch
from rehearsals import checkpoints, load_once, rehearse
from shrinking import RECIPES, SIZES, make_shards, make_weights, rehearsed_ranks, set_task, shrink, source_model, stage_of

from dpt.config.recipe import Recipe, load_recipe
from dpt.data.codec import load_vae
from dpt.data.manifest import VAERecord
from dpt.models.pretrained import read_weights
from dpt.tracking.run import flatten

FAST: dict[str, str] = {}


@pytest.fixture(scope="module")
def vae() -> VAERecord:
    codec = load_vae("embedded")
    return VAERecord(
        name="embedded", sha256=codec.sha256, scaling_factor=codec.scaling_factor, latent_channels=codec.latent_channels
    )


def _rehearse(path: Path, folder: Path, vae: VAERecord, *, compiler: str) -> tuple[Recipe, Path]:
    load_once()
    recipe = load_recipe(path)
    config = recipe.dpt
    places = {"shards": [str(folder / Path(s).parent.name) for s in config.data.shards], "weights": str(folder / "weights")}
    fields = shrink(recipe, **places, output_dir=str(folder / "run"), steps=2)
    small = load_recipe(path, fields).dpt.model
    for shipped, place in zip(config.data.shards, places["shards"], strict=True):
        make_shards(
            Path(place),
            config.task if config.task != "generalist" else set_task(shipped),
            side=small.input_size,
            vae=vae,
            clip=small.clip_embedding_size,
            classes=min(small.num_classes, 8),
        )
    if config.training.weights:
        make_weights(folder / "weights", source_model(recipe, fields))
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


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_rehearsed(path: Path, tmp_path: Path, vae: VAERecord) -> None:
    _check(*_rehearse(path, tmp_path, vae, compiler="aot_eager"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shrinking_changes_sizes_and_places_alone(path: Path) -> None:
    recipe = load_recipe(path)
    fields = shrink(recipe, shards=["x"] * len(recipe.dpt.data.shards), weights="w", output_dir="o", steps=2)
    before, after = (flatten(r.to_dict()) for r in (recipe, load_recipe(path, fields)))
    changed = {name.removeprefix("dpt.") for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= set(SIZES)
