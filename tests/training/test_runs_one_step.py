"""One-step runs from training to prediction: splits, stops, costs, one pass, refusals."""

import json

import numpy as np
import pytest
from training_runs import Runs, ToyRun, zero
from training_toys import make_shards

from dpt.config.checks import check_recipe
from dpt.config.recipe import load_recipe
from dpt.config.sections import EvaluationConfig
from dpt.data.codec import load_vae
from dpt.errors import UserError
from dpt.evaluation.prediction import Predictor
from dpt.models.recipe_costs import recipe_macs
from dpt.training.preflight import needs


@pytest.fixture(scope="module")
def runs(toy_runs: Runs) -> Runs:
    """The same one-step run, of logarithmic depth, on one rank, on two, and stopped and resumed; and not on linear depth."""
    vae = load_vae().record
    log, linear = (
        {"data.shards": [str(make_shards(toy_runs.folder / code, "depth", count=24, vae=vae, encoding={"depth_code": code}))]}
        for code in ("log", "linear")
    )
    fields = {
        "task": "depth",
        "model.num_conditions": 1,
        "model.class_dropout_prob": 0.0,
        "diffusion.timesteps": "last",
        "diffusion.initial_noise": "zero",
        "diffusion.prediction_type": "v_prediction",
        "diffusion.vlb_weight": 0.0,
        "pixel_loss.weight": 0.5,
        "data.posterior": "mean",
        "training.steps": 4,
        **zero(1),
        **log,
    }
    toy_runs.train(1, ToyRun(name="one", fields=fields, stage="finetune"))
    toy_runs.train(
        2,
        ToyRun(name="two", fields=fields | {"train_micro_batch_size_per_gpu": 2}, stage="finetune"),
        ToyRun(name="resumed", fields=fields, stage="finetune", sigterm_at=2),
        ToyRun(name="resumed", fields=fields | linear, stage="finetune", ends=None),
        ToyRun(name="resumed", fields=fields, stage="finetune"),
    )
    return toy_runs


def test_splits_and_stops_change_nothing(runs: Runs) -> None:
    for record in runs.records("one"):
        assert np.isfinite(record["train/pixel_loss"])
        both = record["train/mse"] + 0.5 * record["train/pixel_loss"]
        assert record["train/loss"] == pytest.approx(both, rel=1e-5)
    for name in ("two", "resumed"):
        runs.check_close(name, "one", "train/loss", "train/pixel_loss", "train/grad_norm", rel=2e-4)


def test_weights_carry_the_depth_code_and_runs_keep_to_it(runs: Runs) -> None:
    assert json.loads((runs("one") / "weights" / "config.json").read_text())["depth_code"] == "log"
    assert Predictor(runs("one") / "weights", device="cpu").codes["depth"] == "log"
    refusal = runs.ended["resumed"][1]
    assert "depth is coded as 'linear', in the initial weights as 'log'; encode the set with --depth-code log" in refusal


def test_decoding_counts_as_compute_and_as_memory(runs: Runs) -> None:
    recipe = load_recipe(runs.recipe, {"task": "depth", "model.num_conditions": 1, "pixel_loss.weight": 0.5})
    plain = load_recipe(runs.recipe, {"task": "depth", "model.num_conditions": 1})
    per_sample = recipe_macs(recipe.dpt, recipe.dpt.model).training
    assert per_sample > recipe_macs(plain.dpt, plain.dpt.model).training
    assert runs.history("one", "compute/train_macs")[-1] == per_sample * 4 * 8
    assert "decoder" in needs(recipe, "finetune", 1).plan
    assert needs(recipe, "finetune", 1).bytes_per_rank > needs(plain, "finetune", 1).bytes_per_rank


def test_its_weights_predict_in_one_pass_whatever_is_asked_for(runs: Runs) -> None:
    images = [np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)]
    asked = EvaluationConfig(steps=[50], ensemble=[10], seed=1)
    predictor = Predictor(runs("one") / "weights", config=asked, device="cpu")
    assert (predictor.config.steps, predictor.config.ensemble) == ([1], [1])
    passes: list[int] = []
    predictor.network.register_forward_hook(lambda *_: passes.append(1))
    first = predictor(images, steps=50, ensemble=10)[0].value
    assert len(passes) == 1
    again = Predictor(runs("one") / "weights", config=EvaluationConfig(seed=2), device="cpu")(images)[0].value
    np.testing.assert_array_equal(first, again)


def test_what_cannot_be_is_refused(runs: Runs) -> None:
    one_step = {"diffusion.timesteps": "last", "diffusion.prediction_type": "sample", "diffusion.vlb_weight": 0.0}
    many_steps = {"task": "depth", "model.num_conditions": 1, "pixel_loss.weight": 1.0}
    for fields, words in ((one_step, "is for perception"), (many_steps, 'it needs "last"')):
        with pytest.raises(UserError, match=words):
            check_recipe(load_recipe(runs.recipe, fields), 1, "finetune")
