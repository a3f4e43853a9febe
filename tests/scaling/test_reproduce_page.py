"""The figures in docs/reproduce.md are those of the cost model and the shipped studies."""

import re
from pathlib import Path

import pytest

from dpt.commands.study import device_hours
from dpt.scaling.study import expected_macs, read_study

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"`(studies/paper_\w+\.yaml)` \| (\d+) \| ([\d.]+) E \| (\d+) \|")


def rows():
    return ROW.findall((ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8"))


def test_every_paper_study_has_its_row():
    assert {Path(path).name for path, *_ in rows()} == {p.name for p in (ROOT / "studies").glob("paper_*.yaml")}


@pytest.mark.parametrize(("path", "launches", "exa", "hours"), rows())
def test_launches_macs_and_hours_are_current(path, launches, exa, hours, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(Path(path), uri="sqlite:///x.db")
    total = sum(expected_macs(study, launch) for launch in study.launches if launch.launcher != "evaluate")
    assert len(study.launches) == int(launches)
    assert total / 1e18 == pytest.approx(float(exa), rel=0.01)
    assert device_hours(total, 989e12, 0.4) == pytest.approx(float(hours), rel=0.01, abs=0.6)
