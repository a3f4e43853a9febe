"""At which share of the reference's compute other trainings are as good."""

import dataclasses
import json

import pytest
from made_runs import made_run

from dpt.errors import UserError
from dpt.scaling.figures import FigureSpec, draw, find
from dpt.scaling.shares import shares

Y = "eval/depth/abs_rel"
SPEC = FigureSpec(x="macs", y=Y, steps=1, ensemble=1, group_by="study.size", over="study.seed", reference="paper", law=False)


def trained_and_scored(name, stage, seed, train_macs, settings):
    """A training of some MACs and its evaluation; settings: (steps, members) -> (AbsRel, MACs of a prediction)."""
    training = made_run(f"t_{name}", stage="finetune", metrics={"compute/train_macs": train_macs})
    metrics = {}
    for (steps, members), (abs_rel, macs) in settings.items():
        metrics |= {f"{Y}/s{steps}_n{members}": abs_rel, f"eval/depth/macs/s{steps}_n{members}": macs}
    tags = {"study.size": "w64", "study.stage": stage, "study.seed": seed}
    return training, made_run(f"e_{name}", stage="evaluate", metrics=metrics, tags=tags, parents=[training.run_id])


def runs():
    pairs = []
    for seed, shift in (("0", 0.0), ("1", 0.01)):
        pairs.append(trained_and_scored(f"p{seed}", "paper", seed, 1000.0, {(20, 3): (0.15, 60.0), (1, 1): (0.11, 1.0)}))
        for macs, abs_rel in ((100.0, 0.2), (400.0, 0.1)):
            settings = {(1, 1): (abs_rel + shift, 1.5)}
            pairs.append(trained_and_scored(f"o{seed}_{macs}", "one_step", seed, macs, settings))
    return [e for _, e in pairs], [run for pair in pairs for run in pair]


def test_training_is_interpolated_over_log_macs_in_every_repeat_and_the_prediction_is_the_cheapest_that_is_as_good():
    records, family = runs()
    few, many = shares(records, family, SPEC)
    assert (few.steps, few.ensemble, many.steps, many.ensemble) == (1, 1, 20, 3)
    # seed 0 falls from 0.20 to 0.10 between 100 and 400 MACs, seed 1 from 0.21 to 0.11
    assert many.train_share == pytest.approx((0.1 * 4**0.5 + 0.1 * 4**0.6) / 2)
    assert many.test_share == pytest.approx(1.5 / 60)
    assert (many.reached, many.repeats, many.at_most) == (2, 2, False)
    assert few.train_share == pytest.approx((0.1 * 4**0.9 + 0.4) / 2)
    assert few.test_share == pytest.approx(1.5)


def test_what_is_never_reached_and_what_is_reached_at_once_say_so(tmp_path):
    records, family = runs()
    for record in records:
        if record.tags["study.stage"] == "paper":
            record.metrics.update({f"{Y}/s20_n3": 0.05, f"{Y}/s1_n1": 0.205})
    few, many = shares(records, family, SPEC)
    assert many.reached == 0
    assert few.at_most
    path = draw(find(records, family, SPEC), tmp_path / "share.svg")
    table = path.with_suffix(".md").read_text()
    assert "| w64 20, 3 | 5.00 | not reached | – |" in table
    assert "| w64 1, 1 | 20.50 | at most 0.1" in table
    assert json.loads(path.with_suffix(".json").read_text())["shares"][1]["train_share"] is None


def test_a_metric_that_is_no_evaluations_and_a_missing_stage_are_refused():
    records, family = runs()
    with pytest.raises(UserError, match="need a metric of evaluations"):
        shares(records, family, dataclasses.replace(SPEC, y="train/loss"))
    with pytest.raises(UserError, match=r'w64: shares need evaluations of the stage "papre"'):
        shares(records, family, dataclasses.replace(SPEC, reference="papre"))
