"""Rehearsals of studies on sets of their own: the shipped small ones, one seed each, on scenes made by documented commands."""

import json
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_tools import encode
from data_tools.synthesis import __main__ as synthesis
from dpt import cli
from dpt.scaling.rehearsal import WATERMARK

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted(p.name for p in (ROOT / "studies").glob("*.yaml") if not p.name.startswith("paper_"))
QUICK = "method_fine_tokens.yaml"
"""Reads quickstart's sets alone, of both embedded VAEs."""


def _bash(script: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-ec", script], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def _make_quickstart_sets() -> None:
    """Run the quickstart's commands that make data, for 24 scenes, and that of docs/methods.md on the same scenes."""
    steps = runpy.run_path(str(ROOT / "launchers" / "quickstart.py"))["pipeline"](Path("runs/quickstart"), 24, "")
    page = (ROOT / "docs" / "methods.md").read_text().replace("\\\n", "")
    (more,) = re.findall(r"^    (python -m data_tools.encode .*--out runs/quickstart/.*)$", page, re.MULTILINE)
    for _, _, module, *words in [*(step.command for step in steps if step.command[1] == "-m"), shlex.split(more)]:
        main = {"data_tools.synthesis": synthesis.main, "data_tools.encode": encode.main}[module]
        main([word.replace("train=0.95,val=0.05", "train=0.8,val=0.2") for word in words])


def _small_sets() -> str:
    """The commands of docs/science.md and docs/methods.md that make the other sets, for 24 scenes."""
    page = (ROOT / "docs" / "science.md").read_text()
    (block,) = re.findall(r"stands for `(python -m data_tools.encode --resolution 128)`:\n\n((?:    .*\n)+)", page)
    loops = re.findall(r"    for \w+ in [\w ]+; do\n(?:      .*\n)+    done\n", (ROOT / "docs" / "methods.md").read_text())
    loops = [loop for loop in loops if "data_tools.encode" in loop]
    assert len(loops) == 2
    lines = block[1].replace("--scenes 20400 --splits train=0.98,val=0.02", "--scenes 24 --splits train=0.8,val=0.2")
    assert "24" in lines
    return f'encode() {{ {block[0]} "$@"; }}\n{lines}' + "".join(loops)


def _one_seed(study: str) -> str:
    """The study with the first of its seeds alone."""
    content = yaml.safe_load((ROOT / "studies" / study).read_text())
    for name, axis in content["axes"].items():
        if name == "seed":
            values = axis.get("values", axis)
            for one in list(values)[1:]:
                del values[one]
    Path("studies").mkdir(exist_ok=True)
    (path := Path("studies", study)).write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.mark.parametrize(
    "names", [[QUICK], pytest.param(sorted({*STUDIES} - {QUICK}), marks=pytest.mark.slow)], ids=["one", "the others"]
)
def test_studies_pass_their_rehearsal_on_their_own_sets(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("ds_configs", "launchers"):
        Path(folder).symlink_to(ROOT / folder)
    process = multiprocessing.get_context("spawn").Process(target=_make_quickstart_sets)  # which joins a group of ranks
    process.start()
    process.join()
    assert process.exitcode == 0
    if names != [QUICK]:
        _bash(_small_sets())
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    cli.main(["study", *map(_one_seed, names), "--rehearse", "rehearsal", "--jobs", "2"])
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before  # nothing else is touched
    for name in names:
        content = yaml.safe_load(Path("studies", name).read_text())
        for figure in content["figures"]:
            path = Path("rehearsal", content["output"], "figures", f"{Path(name).stem}_{figure['name']}.json")
            drawn = json.loads(path.read_text())
            assert drawn["watermark"] == WATERMARK
            assert drawn["points"], path
