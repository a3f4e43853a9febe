"""The figure of experts' distances, from runs as MLflow has them."""

import pytest

from dpt import cli
from dpt.commands import experts
from dpt.commands.experts import METRIC, distance_series
from dpt.errors import UserError
from tests.scaling.made_runs import made_run

UPCYCLED = [
    made_run("0" * 8, name="copies", histories={METRIC: [(0, 0.0), (50, 0.1)]}),
    made_run("1" * 8, name="redrawn", histories={METRIC: [(0, 1.0), (50, 0.9)]}),
    made_run("2" * 8, name="redrawn", histories={METRIC: [(0, 1.1), (50, 0.8)]}),
    made_run("3" * 8, name="dense"),
]


def test_runs_with_the_metric_are_lines_under_names_of_their_own():
    series = distance_series(UPCYCLED)
    assert list(series) == ["copies", "redrawn (11111111)", "redrawn (22222222)"]
    assert series["copies"] == [(0.0, 0.0), (50.0, 0.1)]
    with pytest.raises(UserError, match=r"none of these 1 runs has recorded experts/distance; train with --training\."):
        distance_series(UPCYCLED[3:])


def test_the_command_draws_and_says_the_ends(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experts, "selected_runs", lambda arguments: (UPCYCLED, UPCYCLED))
    assert cli.main(["experts", "--experiment", "e", "--out", str(tmp_path / "experts.svg")]) == 0
    assert "copies: 0 at step 0, 0.1 at step 50" in capsys.readouterr().out
    assert "redrawn (11111111)" in (tmp_path / "experts.svg").read_text()
    with pytest.raises(SystemExit):
        cli.main(["experts", "e", "--out", str(tmp_path / "experts.txt")])
    assert "a figure can be written as .svg, .png, .pdf" in capsys.readouterr().err
