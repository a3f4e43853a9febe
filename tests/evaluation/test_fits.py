"""Pictures come to the network's size as in training: `dpt predict` and the evaluator then say the same of the same picture."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import make_model, make_set

from data_tools.encoding.samples import Layout, prepare
from data_tools.readers import Sample
from dpt import tasks
from dpt.config.sections import EvaluationConfig
from dpt.data.manifest import read_manifest, write_manifest
from dpt.errors import UserError
from dpt.evaluation.ensembling import merge_members
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.runner import evaluate
from dpt.fits import Fit, fits_of


def picture(height=40, width=72):
    random = np.random.default_rng(0)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("how", ["stretch", "aspect"])
def test_predictions_of_pictures_are_those_of_encoded_ones(how):
    model = dataclasses.replace(make_model(), fits=fits_of({"fits": {"depth": {"fit": how, "resolution": 48}}}, "w"))
    predictor = Predictor(model, config=EvaluationConfig(steps=[2], ensemble=[1]), device="cpu")
    image = picture()
    sample = Sample(key="k", images=(image,), depth=np.ones(image.shape[:2], np.float32))
    encoded = prepare(sample, Layout(task="depth", resolution=48, fit=how))[0]
    shown = [tasks.image_to_float(encoded.images["cond_latents"][0])]
    shown.append(tasks.all_valid_prompt(*shown[0].shape[-2:]))
    assert shown[0].shape[-2:] == ((48, 48) if how == "stretch" else (32, 48))
    moments = model.codec.encode(torch.from_numpy(np.stack(shown)))
    latents = predictor.predict_latents(
        moments[None, :, 0] * model.codec.record.scaling_factor, ["k"], [0], task="depth", steps=2
    )
    wanted = merge_members("depth", predictor.decode(latents, "depth")[0], image.shape[:2], predictor.config.aggregation).value
    np.testing.assert_allclose(predictor([image], keys=["k"])[0].value, wanted, atol=1e-5)


def test_crops_and_margins_of_training_are_predicted_for_as_whole_pictures():
    for how in ("crop", "pad", "aspect"):
        assert Fit(how=how).size(40, 72, 48, multiple=16) == (32, 48)
    assert Fit(how="stretch").size(40, 72, 48, multiple=16) == (48, 48)


def test_weights_that_say_nothing_keep_the_aspect_and_unknown_fits_are_refused():
    assert fits_of({}, "w")["flow"] == Fit(how="aspect", resolution=0)
    for value in ({"fit": "squash"}, {"resolution": 3}, "stretch", {"fit": "stretch", "resolution": -1}):
        with pytest.raises(UserError, match=r"w: fit .* is unknown"):
            fits_of({"fits": {"depth": value}}, "w")


def test_sets_of_another_fit_are_named_and_recorded(tmp_path, capsys):
    folder = make_set(tmp_path / "set", count=1)
    write_manifest(folder, dataclasses.replace(read_manifest(folder), encoding={"fit": "aspect"}))
    config = EvaluationConfig(data=[str(folder)], output_dir=str(tmp_path / "out"), steps=[1], ensemble=[1], pictures=0)
    for how, said in (("aspect", False), ("stretch", True)):
        fits = fits_of({"fits": {"depth": {"fit": how, "resolution": 32}}}, "w")
        predictor = Predictor(dataclasses.replace(make_model(), fits=fits), config=config, device="cpu")
        summary = evaluate(config, predictor=predictor)
        assert summary["sets"]["synthetic_val"]["fit"] == "aspect at 32 px"
        assert summary["settings"]["fits"]["depth"] == {"fit": how, "resolution": 32}
        words = "encoded with --fit aspect at 32 px; the weights learnt with stretch at 32 px"
        assert (words in capsys.readouterr().out) == said
