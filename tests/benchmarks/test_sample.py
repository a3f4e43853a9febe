"""The two ways of evaluation agree where they are scored on true depth."""

import dataclasses

import numpy as np
import pytest

from benchmarks import sample
from dpt.config.sections import EvaluationConfig
from dpt.data.codec import load_vae
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.protocols import PROTOCOLS, score
from dpt.evaluation.sets import EvaluationSet
from tests.evaluation.tiny import make_model, make_set


def test_a_network_is_scored_on_the_truths_that_are_given(tmp_path):
    loaded = dataclasses.replace(make_model(prediction_type="v_prediction"), codec=load_vae())
    predictor = Predictor(loaded, config=EvaluationConfig(steps=[2], ensemble=[2], batch_size=4))
    data = EvaluationSet(make_set(tmp_path / "set", size=(32, 32), count=2), protocol="hypersim")
    images, truths = [s.image for s in data], [s.truth for s in data]
    row = sample.evaluation(predictor, images, 1, truths)[0]
    errors = [score(PROTOCOLS["hypersim"], p.value, t)["abs_rel"] for p, t in zip(predictor(images), truths, strict=True)]
    assert row["abs_rel"] == pytest.approx(np.mean(errors))
    assert row["abs_rel_apart"] < 1e-3


def test_weights_and_shards_go_together(capsys):
    with pytest.raises(SystemExit) as exit_:
        sample.main(["--weights", "somewhere"])
    assert exit_.value.code == 2
    assert "--shards" in capsys.readouterr().err
