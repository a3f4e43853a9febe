"""The figures in docs/reproduce.md are those of the cost model and the shipped studies."""

import re
from pathlib import Path

import pytest

from dpt.commands.study import device_hours
from dpt.scaling.shard_sets import ARGUMENTS, FOLDER, encode_command
from dpt.scaling.study import expected_macs

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"`studies/(paper_\w+\.yaml)` \| (\d+) \| ([\d.]+) E \| ([\d.]+) \|")


def rows():
    return ROW.findall((ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8"))


def test_every_paper_study_has_its_row():
    assert {name for name, *_ in rows()} == {p.name for p in (ROOT / "studies").glob("paper_*.yaml")}


@pytest.mark.parametrize(("name", "launches", "exa", "hours"), rows())
def test_launches_macs_and_hours_are_current(name, launches, exa, hours, shipped):
    study = shipped(name)
    total = sum(expected_macs(study, launch) for launch in study.launches if launch.launcher != "evaluate")
    assert len(study.launches) == int(launches)
    assert total / 1e18 == pytest.approx(float(exa), rel=0.01)
    assert device_hours(total, 989e12, 0.4) == pytest.approx(float(hours), rel=0.01, abs=0.6)


def test_the_page_has_the_command_of_every_shard_set():
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    commands = [line.strip() for line in page.splitlines() if line.startswith("    python -m data_tools.encode ")]
    assert commands == [encode_command(f"{FOLDER}/{name}") for name in ARGUMENTS]


def test_every_shard_set_of_the_paper_has_a_command(shipped):
    from data_tools.encode import parser

    for study, *_ in rows():
        for needed in shipped(study).needs:
            assert needed.startswith("weights/") or encode_command(needed), needed
    for name in ARGUMENTS:
        parser().parse_args(encode_command(f"{FOLDER}/{name}").split()[3:])
