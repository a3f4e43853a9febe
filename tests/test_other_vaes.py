"""A VAE of 16 pixels a latent, 32 channels, a shift and statistics by channel, from shards to scores and images."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import encode, inspect
from data_tools.readers import READERS, Sample
from dpt import cli
from dpt.config.recipe import load_recipe
from dpt.config.sections import DiffusionConfig, EvaluationConfig, ModelConfig
from dpt.data.codec import load_vae
from dpt.data.manifest import read_manifest
from dpt.errors import UserError
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.runner import evaluate
from dpt.models.dit import DiT
from dpt.models.exporting import export_weights
from dpt.models.recipe_costs import recipe_macs
from dpt.models.vae_costs import decoder_costs, vae_config, vae_size
from dpt.training.data_loader import open_data_loader
from dpt.training.preflight import needs
from tests.evaluation.image_networks import Random, save_network
from tests.gloo import run_script
from tests.publishing.small import statistics_vae
from tests.test_examples import ROOT

SIDE = 64


class Scenes:
    """Pictures and depths made of their numbers."""

    name, task, version, class_names = "synthetic_scenes", "depth", 1, ()

    def __init__(self, root: Path, split: str) -> None:
        self.count = 6 if split == "train" else 2

    def keys(self) -> list[str]:
        return [str(number) for number in range(self.count)]

    def read(self, key: str) -> Sample:
        picture = np.random.default_rng(int(key)).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        return Sample(key=key, images=(picture,), depth=1 + picture[..., 0].astype(np.float32) / 64)


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The VAE, depth shards of it, and weights trained on them."""
    folder = tmp_path_factory.mktemp("vae")
    vae = statistics_vae(folder / "f16d32", channels=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        patch.setitem(READERS, "scenes", Scenes)
        for split, more in (("train", []), ("val", ["--evaluation"])):
            command = ["--dataset", "scenes", "--root", str(folder), "--split", split, "--vae", str(vae), "--resolution", "64"]
            encode.main([*command, "--prompt", "none", "--processes", "0", "--out", str(folder / split), *more])
        model = {"input_size": 4, "in_channels": 32, "num_conditions": 1, "hidden_size": 32, "depth": 1, "num_heads": 2}
        recipe = {
            "train_batch_size": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "dpt": {
                "task": "depth",
                "model": model,
                "diffusion": {"timesteps": "last", "prediction_type": "sample", "vlb_weight": 0.0},
                "pixel_loss": {"weight": 0.5},
                "data": {"shards": [str(folder / "train")], "posterior": "mean", "vae": str(vae)},
                "training": {"steps": 2, "output_dir": str(folder / "run")},
                "tracking": {"enabled": False},
            },
        }
        path = folder / "recipe.json"
        path.write_text(json.dumps(recipe))
        patch.chdir(folder)
        log = folder / "log.txt"
        assert run_script(log, str(ROOT / "launchers" / "finetune.py"), "--ds_config", str(path)) == 0, log.read_text()
    return SimpleNamespace(folder=folder, vae=vae, recipe=path)


def test_shards_say_what_made_them(road, capsys) -> None:
    manifest, codec = read_manifest(road.folder / "train"), load_vae(str(road.vae))
    assert manifest.vae == codec.record
    assert (manifest.vae.downsampling, manifest.vae.shift_factor, len(manifest.vae.latents_std)) == (16, 0.25, 32)
    assert manifest.members["target_latents"].shape == (1, 2, 32, 4, 4)
    assert manifest.members["valid"].shape == (4, 4)
    inspect.main([str(road.folder / "train"), "--rows", "1", "--picture", str(road.folder / "sheet.png")])
    assert "factor 0.5, shift factor 0.25, statistics by channel, 32 channels, 16 px per latent" in capsys.readouterr().out


def test_weights_know_it_and_are_scored_and_used_with_it(road) -> None:
    weights = road.folder / "run" / "weights"
    said = json.loads((weights / "config.json").read_text())["vae"]
    assert load_vae(str(road.vae)).record.difference(said) == ""
    config = EvaluationConfig(
        weights=str(weights), data=[str(road.folder / "val")], output_dir=str(road.folder / "out"), pictures=0
    )
    predictor = Predictor(weights, config=config, device="cpu")
    one = evaluate(config, predictor=predictor)["sets"]["synthetic_scenes_val"]
    assert np.isfinite(one["results"][0]["metrics"]["abs_rel"])
    assert np.isfinite(one["ceiling"]["abs_rel"])
    picture = np.random.default_rng(5).integers(0, 255, (48, 96, 3), dtype=np.uint8)
    assert predictor([picture])[0].value.shape == (48, 96)
    conditions = predictor._encode_conditions("depth", [picture], None, 0)[0]
    assert conditions.shape == (1, 32, 4, 4)  # stretched to 64 px a side, as its shards were

    other = shutil.copytree(road.vae, road.folder / "other")
    config_file = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config_file | {"shift_factor": None}))
    with pytest.raises(UserError, match=r"another VAE than .*shift_factor 0\.25, not 0\.0"):
        Predictor(weights, vae=str(other), device="cpu")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model.in_channels": 4}, r"made latents of 32 channels, dpt\.model\.in_channels is 4"),
        ({"model.input_size": 8}, r"latents of 4 x 4 \(64 px, 16 px per latent\), dpt\.model\.input_size is 8; set it to 4"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(road, fields, words) -> None:
    config = load_recipe(road.recipe, fields).dpt
    with pytest.raises(UserError, match=words):
        open_data_loader(config, global_batch_size=2, micro_batch_size=2, start_sample=0, pin_memory=False)


def test_costs_are_those_of_this_vae(road) -> None:
    recipe = load_recipe(road.recipe, {})
    size = vae_size(vae_config(str(road.vae)))
    assert (size.params, size.downsampling) == (sum(p.numel() for p in load_vae(str(road.vae)).vae.parameters()), 16)
    plain = recipe_macs(load_recipe(road.recipe, {"pixel_loss.weight": 0.0}).dpt, recipe.dpt.model).training
    decoding = decoder_costs(vae_config(str(road.vae)), 4, 4).macs
    assert recipe_macs(recipe.dpt, recipe.dpt.model).training == plain + 3 * decoding
    unknown = load_recipe(road.recipe, {"data.vae": "nobody/no-such-vae"})  # counts as Stable Diffusion's
    assert needs(unknown, "finetune", 1).memory.decoder > needs(recipe, "finetune", 1).memory.decoder > 4 * size.params


def test_images_of_classes_and_their_fid(road, tmp_path, capsys, monkeypatch) -> None:
    for number in range(6):
        place = tmp_path / "in" / str(number % 2) / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(number).integers(0, 255, (80, 70, 3), dtype=np.uint8)
        Image.fromarray(picture).save(place)
    command = ["--dataset", "image_folder", "--root", str(tmp_path / "in"), "--vae", str(road.vae), "--resolution", str(SIDE)]
    encode.main([*command, "--processes", "0", "--out", str(tmp_path / "shards")])
    torch.manual_seed(0)
    model = DiT(ModelConfig(hidden_size=32, depth=1, num_heads=2, input_size=4, in_channels=32, num_classes=2))
    sections = {"task": "class", "diffusion": dataclasses.asdict(DiffusionConfig())}
    sections["vae"] = dataclasses.asdict(load_vae(str(road.vae)).record)
    weights = export_weights(model, tmp_path / "weights", sections=sections)
    assert cli.main(["sample", "--weights", str(weights), "--labels", "0,1", "--steps", "1", "--out", str(tmp_path / "s")]) == 0
    assert [Image.open(path).size for path in sorted((tmp_path / "s").glob("*.png"))] == [(SIDE, SIDE)] * 2
    path, sha256 = save_network(Random(), tmp_path / "features.pt")
    command = ["fid", str(weights), "--reference", str(tmp_path / "shards"), "--features", path, "--features-sha256", sha256]
    command += ["--num-images", "6", "--steps", "1", "--no-tracking", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert np.isfinite(json.loads((tmp_path / "out" / "fid.json").read_text())["metrics"]["fid"])
