"""A generalist on several sets of each task: each keeps its name and protocol, and whatever reads the records finds them."""

import itertools

import pytest

from dpt.config.sections import EvaluationConfig
from dpt.errors import UserError
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.runner import evaluate
from dpt.evaluation.summary import protocol_line, tracked_metrics
from dpt.scaling.compare import compare
from dpt.scaling.observations import observe
from dpt.scaling.points import FigureSpec, collect
from dpt.scaling.report import render
from dpt.scaling.results import evaluation_rows
from dpt.scores import MAIN_METRIC, METRICS, show
from dpt.tracking.read import RunRecord
from tests.evaluation.tiny import make_model, make_set
from tests.scaling.made_runs import made_run

SETTINGS = [(1, 1), (1, 2), (2, 1), (2, 2)]

PERCEPTION = [task for task in MAIN_METRIC if task != "class"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[RunRecord]]:
    """The summary of a generalist on two sets of each task, and the runs: pre-training, fine-tuning, evaluation."""
    folder = tmp_path_factory.mktemp("sets")
    sets = [make_set(folder / f"{task}{number}", task, count=1 + number) for task in PERCEPTION for number in range(2)]
    settings = {"steps": [1, 2], "ensemble": [1, 2], "pictures": 0, "output_dir": str(folder / "out")}
    config = EvaluationConfig(data=[str(one) for one in sets], **settings)
    summary = evaluate(config, predictor=Predictor(make_model("generalist"), config=config, device="cpu"))
    model = {"model.hidden_size": "32", "model.depth": "1", "model.num_heads": "2", "model.input_size": "4"}
    trained = {"train/samples_seen": 100.0, "compute/train_macs": 1e9}
    runs = [
        made_run("base", params={**model, "task": "class"}, metrics=trained),
        made_run("tuned", stage="finetune", parents=["base"], params={**model, "task": "generalist"}, metrics=trained),
    ]
    tags = {"dpt.dataset": ", ".join(summary["sets"]), "dpt.protocol": protocol_line(summary)}
    runs.append(made_run("scores", stage="evaluate", parents=["tuned"], metrics=tracked_metrics(summary), tags=tags))
    return summary, runs


def test_records_keep_each_sets_name_and_protocol(evaluated) -> None:
    summary, runs = evaluated
    assert len(summary["sets"]) == 6
    rows = [row for row in evaluation_rows(runs[-1]) if row.run is not None]
    expected = {
        (one["task"], name, one["protocol"], one["num_samples"], *setting)
        for (name, one), setting in itertools.product(summary["sets"].items(), SETTINGS)
    }
    assert {(r.task, r.dataset, r.protocol, r.num_samples, r.steps, r.ensemble) for r in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        results = {(r["steps"], r["ensemble"]): r["metrics"] for r in summary["sets"][row.dataset]["results"]}
        assert row.metrics == pytest.approx(results[row.steps, row.ensemble])


@pytest.mark.parametrize("task", PERCEPTION)
def test_laws_compare_and_plan_find_the_main_metric_by_set(evaluated, task: str) -> None:
    summary, runs = evaluated
    metric = MAIN_METRIC[task]
    names = [name for name, one in summary["sets"].items() if one["task"] == task]
    for name in names:
        value = summary["sets"][name]["results"][-1]["metrics"][metric]
        (point,) = collect(runs, runs, FigureSpec(y=f"eval/{task}/{name}/{metric}"))
        assert (point.x, point.y) == (2e9, value)
        assert len(collect(runs, runs, FigureSpec(x="test_macs", y=f"eval/{task}/{name}/{metric}"))) == len(SETTINGS)
        row = f"{task}/{name}: {METRICS[metric].title}, 2 steps × 2 samples"
        assert compare(runs[-1:], runs).rows()[row] == [show(metric, value)]
        observations = observe(runs, runs, task, metric, dataset=name)
        assert [(o.setting.steps, o.setting.ensemble) for o in observations] == SETTINGS
        assert observations[-1].error == pytest.approx(1 - value if metric == "iou" else value)
    for x in ("macs", "test_macs"):
        with pytest.raises(UserError, match=rf"of several sets in this evaluation; choose eval/{task}/{names[0]}/{metric} or"):
            collect(runs, runs, FigureSpec(x=x, y=f"eval/{task}/{metric}"))
    with pytest.raises(UserError, match="choose one with --dataset"):
        observe(runs, runs, task, metric)


def test_the_report_has_a_table_of_each_set_and_the_best_of_each_task(evaluated) -> None:
    summary, runs = evaluated
    page = render("generalist", runs, "store")
    for task, metric in ((task, MAIN_METRIC[task]) for task in PERCEPTION):
        assert f"best {task} {METRICS[metric].title}" in page
    for name, one in summary["sets"].items():
        _, _, table = page.partition(f"<h3>{one['task'].capitalize()} on {name}, {one['num_samples']} samples</h3>")
        table = table.partition("<h3>")[0]
        metric = MAIN_METRIC[one["task"]]
        assert METRICS[metric].name in table
        for result in one["results"]:
            assert show(metric, result["metrics"][metric]) in table
