import dataclasses

import numpy as np
import pytest

from dpt.config.sections import DiffusionConfig
from dpt.errors import UserError
from dpt.evaluation import Predictor, loading
from dpt.models.exporting import export_weights
from tests.evaluation.tiny import PoolingCodec, make_model


@pytest.fixture(autouse=True)
def _pooling_vae(monkeypatch):
    monkeypatch.setattr(loading, "load_vae", lambda name: PoolingCodec())


def _export(path, **sections):
    model = make_model("depth", prediction_type="v_prediction", num_experts=2, capacity_factor=1.0)
    known = {
        "diffusion": dataclasses.asdict(model.diffusion),
        "vae": {"name": "pooling", "sha256": PoolingCodec.sha256},
        "task": "depth",
        "lineage": {"run_id": "abc"},
    }
    kept = {name: value for name, value in (known | sections).items() if value is not None}
    return model, export_weights(model.network, path, sections=kept)


def test_exported_weights_predict_as_the_network_they_are_of(tmp_path):
    model, path = _export(tmp_path / "weights")
    loaded = loading.load_model(path)
    assert loaded.task == "depth"
    assert loaded.diffusion == DiffusionConfig(prediction_type="v_prediction")
    assert loaded.lineage == {"run_id": "abc"}
    assert loaded.model == dataclasses.replace(model.model, capacity_factor=0.0)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    ours = dataclasses.replace(model, network=loaded.network, model=loaded.model)
    results = [Predictor(w, device="cpu")([image], steps=2)[0].value for w in (str(path), ours)]
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"diffusion": None}, "nothing says what"),
        ({"vae": None}, "which VAE"),
        ({"vae": {"name": "pooling", "sha256": "other"}}, "another VAE"),
        ({"diffusion": {"prediction_type": "score"}}, "prediction_type = 'score' is unknown to dpt"),
        ({"diffusion": {"noise_offset": 0.1}}, "noise_offset = 0.1 is unknown to dpt"),
        (
            {"diffusion": {"num_train_timesteps": "many"}},
            r"num_train_timesteps is 'many'; it must be a whole number",
        ),
        ({"depth_code": "octave"}, "depth code 'octave' is unknown; it is one of linear, log, disparity"),
        ({"depth_prompt": "holes"}, "depth prompt 'holes' is unknown; it is one of all_valid, ground_truth"),
    ],
)
def test_what_cannot_be_sampled_is_refused(tmp_path, sections, words):
    _, path = _export(tmp_path / "weights", **sections)
    with pytest.raises(UserError, match=words):
        loading.load_model(path)


def test_a_vae_with_other_channels_is_refused(tmp_path, monkeypatch):
    _, path = _export(tmp_path / "weights", vae={"name": "pooling"})
    monkeypatch.setattr(PoolingCodec, "latent_channels", 16)
    with pytest.raises(UserError, match="takes latents of 4 channels, VAE 'pooling' makes 16; name the one of training"):
        loading.load_model(path)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        loading.load_model(tmp_path / "nowhere")
