"""The quickstart's road: every step is a command that parses, and reads what an earlier one makes."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest

from data_tools.encode import parser
from dpt.config.command import parse_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "launchers" / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("out", ["runs/quickstart", "elsewhere/road"])
def test_every_step_reads_what_an_earlier_one_makes(quickstart: ModuleType, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made: list[Path] = []
    scored = {}
    for step in quickstart.road(Path(out), 60, "sqlite:///x.db"):
        words = step.command
        if "--ds_config" in words:
            launcher = Path(words[words.index("--ds_config") - 1]).stem
            home = "evaluation" if launcher == "evaluate" else "training"
            config = parse_command(launcher, "", home, words[words.index("--ds_config") :]).dpt
            place, reads = (
                (config.evaluation, config.evaluation.data) if home == "evaluation" else (config.training, config.data.shards)
            )
            assert Path(place.output_dir) == step.folder
            assert {Path(read) for read in reads} <= set(made)
            assert not place.weights or Path(place.weights).parent in made
            if home == "evaluation":
                scored[Path(place.weights).parent.name] = (config.evaluation.steps, config.evaluation.ensemble)
        elif "data_tools.encode" in words:
            arguments = parser().parse_args(words[words.index("data_tools.encode") + 1 :])
            assert Path(arguments.out) == step.folder
            assert Path(arguments.root).parent in made
        made.append(step.folder)
        assert step.result.is_relative_to(out)
    assert scored.pop("one_step") == ([1], [1])
    assert all(setting == ([10], [1, 5]) for setting in scored.values())
    assert set(scored) == {"untrained", "depth", "upcycled"}


def test_titles_and_folders_are_unlike(quickstart: ModuleType) -> None:
    steps = quickstart.road(Path("out"), 60, "sqlite:///x.db")
    for one, other in itertools.combinations(steps, 2):
        assert one.title != other.title
        assert one.folder != other.folder
