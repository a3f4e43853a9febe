"""What MLflow gets of an evaluation."""

import dataclasses
from pathlib import Path

import pytest

from dpt import tracking
from dpt.config.recipe import DptConfig, Recipe
from dpt.config.sections import EvaluationConfig
from dpt.errors import UserError
from dpt.evaluation import recording, runner
from dpt.evaluation.prediction import Predictor
from tests.evaluation.tiny import make_model


def test_an_evaluation_is_recorded_under_its_parent(depth_set, tmp_path, monkeypatch):
    class Recorder(tracking.Run):
        def __init__(self) -> None:
            super().__init__()
            self.started, self.metrics, self.tags, self.files = {}, {}, {}, []

        def log_metrics(self, metrics, step):
            self.metrics |= metrics

        def log_picture(self, path, name, step=None):
            self.files.append(f"pictures/{name}")

        def log_artifact(self, path, folder=""):
            assert Path(path).exists()
            self.files.append(f"{folder}/{Path(path).name}")

        def set_tags(self, tags):
            self.tags |= tags

    recorder = Recorder()
    monkeypatch.setattr(tracking, "start_run", lambda config, **more: (recorder.started.update(more), recorder)[1])
    monkeypatch.setattr(
        recording, "Predictor", lambda weights, config, vae, read: Predictor(make_model(), config=config, device="cpu")
    )
    config = EvaluationConfig(
        data=[str(depth_set)],
        output_dir=str(tmp_path / "out"),
        weights="runs/depth/weights",
        steps=[2],
        pictures=1,
    )
    runner.run_evaluation(Recipe(deepspeed={}, dpt=DptConfig(evaluation=config)))
    assert recorder.started["stage"] == "evaluate"
    assert recorder.started["parents"] == ["parent"]
    recorded = recorder.started["params"]["dpt"]  # of the weights, whatever the recipe says
    assert (recorded["task"], recorded["model"]["num_conditions"], recorded["model"]["hidden_size"]) == ("depth", 2, 32)
    assert recorded["diffusion"]["prediction_type"] == "sample"
    recorder.started.clear()
    refused = Recipe(deepspeed={}, dpt=DptConfig(evaluation=dataclasses.replace(config, protocol="nothing")))
    with pytest.raises(UserError, match="protocol"):
        runner.run_evaluation(refused)
    assert not recorder.started  # and no run says that it failed
    assert recorder.metrics["eval/depth/abs_rel"] == recorder.metrics["eval/depth/abs_rel/s2_n1"]
    assert "synthetic_depth v1, N=5, list " in recorder.tags["dpt.protocol"]
    assert recorder.tags["dpt.vae"] == "pooling"
    assert {"/summary.json", "synthetic_val/samples.parquet", "pictures/synthetic_val_best"} <= set(recorder.files)
