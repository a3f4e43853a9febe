"""Validation while training: the same on any number of ranks and over stops, the best weights, an early end."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from training_runs import STEPS, Runs, ToyRun, interrupted, zero
from training_toys import SIDE, make_shards, write_shards

from dpt.config.checks import check_recipe
from dpt.config.recipe import load_recipe
from dpt.config.sections import EvaluationConfig
from dpt.data.codec import load_vae
from dpt.data.manifest import VAERecord
from dpt.errors import UserError
from dpt.evaluation.runner import evaluate
from dpt.models.costs import num_params
from dpt.training.outputs import has_finished
from dpt.training.preflight import needs
from dpt.training.validation import Best


def make_evaluation_set(folder: Path, vae: VAERecord) -> Path:
    """Random pictures and depths of as many pixels as the toy latents stand for."""
    random, side = np.random.default_rng(5), 8 * SIDE
    samples = [
        {
            "cond_latents": random.normal(size=(2, 2, 4, SIDE, SIDE)).astype(np.float16),
            "image": random.integers(0, 256, (side, side, 3), dtype=np.uint8),
            "truth": random.uniform(1, 5, (side, side)).astype(np.float32),
        }
        for _ in range(5)
    ]
    return write_shards(folder, samples, "depth", dataset="synthetic", split="val", vae=vae)


@pytest.fixture(scope="module")
def runs(toy_runs: Runs) -> Runs:
    """The same run on one rank, on two, and stopped between validations; and one that does not learn."""
    vae = load_vae().record
    fields = {
        "task": "depth",
        "model.num_conditions": 2,
        "model.class_dropout_prob": 0.0,
        "data.shards": [str(make_shards(toy_runs.folder / "depth", "depth", count=24, vae=vae))],
        "data.posterior": "mean",
        "validation.every": 4,
        "validation.data": [str(make_evaluation_set(toy_runs.folder / "val", vae))],
        "validation.steps": 2,
        **zero(1),
    }
    still = fields | {"optimizer.params.lr": 1e-30, "optimizer.params.weight_decay": 0.0, "validation.patience": 1}
    toy_runs.train(
        1,
        ToyRun(name="one", fields=fields, stage="finetune"),
        ToyRun(name="still", fields=still, stage="finetune", ends="stopped"),
        ToyRun(name="unknown", fields=fields | {"validation.metric": "depth/abs"}, stage="finetune", ends=None),
        ToyRun(name="foreign", fields=fields | {"validation.metric": "flow/epe"}, stage="finetune", ends=None),
        ToyRun(name="shards", fields=fields | {"validation.data": fields["data.shards"]}, stage="finetune", ends=None),
    )
    toy_runs.train(
        2,
        ToyRun(name="two", fields=fields | {"zero_optimization.stage": 2}, stage="finetune"),
        *interrupted("resumed", fields, 6, stage="finetune"),
    )
    return toy_runs


def test_ranks_and_stops_change_nothing(runs: Runs) -> None:
    one = runs.state("one")["validation"]
    assert one["step"] in (4, 8, STEPS)
    for name in ("two", "resumed"):
        other = runs.state(name)["validation"]
        assert (other["step"], other["misses"], other["stopped"]) == (one["step"], one["misses"], False)
        assert other["value"] == pytest.approx(one["value"], rel=1e-3)


def test_the_best_weights_score_what_validation_says(runs: Runs, tmp_path: Path) -> None:
    for name in ("one", "two"):
        best, recorded = runs(name) / "best", runs.state(name)["validation"]
        lineage = json.loads((best / "config.json").read_text())["lineage"]
        assert lineage["step"] == recorded["step"]
        config = EvaluationConfig(
            weights=str(best), data=[str(runs.folder / "val")], steps=[2], pictures=0, output_dir=str(tmp_path / name)
        )
        (result,) = evaluate(config)["sets"]["synthetic_val"]["results"]
        assert result["metrics"]["abs_rel"] == pytest.approx(recorded["value"], rel=1e-4)


def test_a_run_that_gets_no_better_ends_and_is_finished(runs: Runs) -> None:
    ended = runs.state("still")
    assert ended["step"] == 8
    assert ended["validation"] == {"step": 4, "value": ended["validation"]["value"], "misses": 1, "stopped": True}
    assert has_finished(runs("still"), STEPS)
    assert not has_finished(runs("still") / "nowhere", STEPS)


def test_the_memory_plan_counts_it(runs: Runs) -> None:
    fields = {"task": "depth", "model.num_conditions": 2}
    without, with_it = (needs(load_recipe(runs.recipe, fields | {"validation.every": n}), "finetune", 1) for n in (0, 4))
    assert without.memory.pictures == 0
    assert with_it.memory.pictures > 4 * num_params(load_recipe(runs.recipe, fields).dpt.model).total


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"task": "class", "model.num_conditions": 0}, "is for perception"),
        ({"validation.data": []}, "name an evaluation shard folder"),
        ({"validation.patience": -1}, "patience is -1; it must be at least 0"),
        ({"validation.steps": 0}, "at least 1 and at most 1000"),
    ],
)
def test_what_makes_no_sense_is_refused(runs: Runs, fields: dict, sentence: str) -> None:
    whole = {"task": "depth", "model.num_conditions": 2, "validation.every": 4, "validation.data": ["x"], **fields}
    with pytest.raises(UserError, match=sentence):
        check_recipe(load_recipe(runs.recipe, whole), 1)


def test_unknown_metrics_and_sets_of_another_task_are_refused(runs: Runs) -> None:
    (unknown,), (foreign,), (training,) = (runs.ended[name] for name in ("unknown", "foreign", "shards"))
    assert 'dpt.validation.metric "depth/abs" is not among depth/synthetic_val/abs_rel' in unknown
    assert not (runs("unknown") / "records.jsonl").exists()  # before the first step
    assert 'there is no "flow"; it may begin with depth, depth/synthetic_val.' in foreign
    assert "encode the set for evaluation" in training


def test_a_score_that_is_not_a_number_is_never_the_best() -> None:
    lower = SimpleNamespace(is_better=lambda value, other: value < other)
    best = Best().after(4, math.nan, lower, patience=0)
    assert (best.step, best.misses) == (0, 1)
    best = best.after(8, 0.5, lower, patience=0).after(12, math.nan, lower, patience=0)
    assert (best.step, best.value, best.misses) == (8, 0.5, 1)
