"""Runs side by side."""

import csv
import io

import pytest
from made_runs import Checker, made_run

from dpt import cli
from dpt.commands import compare as command
from dpt.scaling.compare import as_csv, as_html, as_text, compare, differing_fields


@pytest.fixture
def runs():
    loss = {"train/loss": [(0, 5.0), (10, 1.0), (20, 2.0)], "compute/train_macs": [(10, 1e12), (20, 2e12)]}
    same = {"metrics": {"train/loss": 2.0, "compute/train_macs": 2e12}, "histories": loss}
    one, two = ({"task": "depth", "tracking.run_name": n, "training.steps": steps} for n, steps in (("x", "10"), ("y", "20")))
    return [
        made_run("one", params=one, tags={"dpt.ranks": "4"}, **same),
        made_run("two", stage="finetune", parents=["one"], params=two, **same),
        made_run("three", stage="evaluate", parents=["two"], metrics={"eval/depth/abs_rel/s1_n1": 0.125}),
    ]


def test_only_what_differs_is_shown(runs):
    fields = differing_fields(runs[:2])
    assert fields == {"training.steps": ["10", "20"]}
    assert differing_fields(runs) == {"training.steps": ["10", "20", "–"]}
    channels = [made_run(str(n), stage="evaluate", params={"generation.guidance_channels": str(n)}) for n in (0, 3)]
    assert differing_fields([*runs, *channels])["generation.guidance_channels"] == ["–", "–", "–", "0", "3"]


def test_metrics_compute_cost_and_ancestors(runs):
    rows = compare(runs, runs, price=2.0).rows()
    assert rows["from"] == ["–", "one", "two < one"]
    assert rows["train/loss (end)"] == ["2", "2", "–"]
    assert rows["train/loss (least)"] == ["1", "1", "–"]
    assert rows["depth: AbsRel % ↓, 1 step"] == ["–", "–", "12.50"]  # in the unit of all tables, which the name says
    assert rows["MACs with ancestors"] == ["2 T", "4 T", "4 T"]
    assert rows["cost"] == ["0.13", "0.03", "0.03"]  # a minute on four devices, and on one


def test_text_csv_and_page(runs):
    comparison = compare(runs, runs)
    assert "train/loss (end)" in as_text(comparison)
    lines = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert [line["name"] for line in lines] == ["one", "two", "three"]
    assert lines[1]["training.steps"] == "20"
    assert Checker(as_html(comparison, runs)).tags.count("img") == 2  # no samples were recorded


def test_the_command_writes_by_suffix(runs, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "selected_runs", lambda arguments: (runs, runs))
    assert cli.main(["compare", "one", "two", "--out", str(tmp_path / "c.csv")]) == 0
    assert (tmp_path / "c.csv").read_text().startswith("run_id,name,stage")
    with pytest.raises(SystemExit):
        cli.main(["compare", "one", "--out", str(tmp_path / "c.pdf")])
    assert "can be written as" in capsys.readouterr().err
