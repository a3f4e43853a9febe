"""The quickstart: every step is a command that parses, and reads what an earlier one makes."""

import itertools
import runpy
from pathlib import Path

import pytest

from data_tools.encode import parser
from dpt.commands.steps import Step, run_steps
from dpt.config.command import parse_command
from dpt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


PIPELINE = runpy.run_path(str(ROOT / "launchers" / "quickstart.py"))["pipeline"]


@pytest.mark.parametrize("out", ["runs/quickstart", "elsewhere/made"])
def test_every_step_reads_what_an_earlier_one_makes(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made: list[Path] = []
    results: dict[Path, Path] = {}  # of folder
    scored = {}
    vaes = {}  # of folder
    for step in PIPELINE(Path(out), 60, "sqlite:///x.db"):
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
            assert {vaes[Path(read)] for read in reads} == {config.data.vae}
            assert {results[Path(read)] for read in reads} <= set(step.needs)
            assert not place.weights or results[Path(place.weights).parent] in step.needs
            assert not place.weights or Path(place.weights).parent in made
            if home == "evaluation":
                scored[Path(place.weights).parent.name] = (config.evaluation.steps, config.evaluation.ensemble)
        elif "data_tools.encode" in words:
            arguments = parser().parse_args(words[words.index("data_tools.encode") + 1 :])
            assert Path(arguments.out) == step.folder
            assert Path(arguments.root).parent in made
            vaes[step.folder] = arguments.vae
        assert set(step.needs) <= set(results.values())
        made.append(step.folder)
        results[step.folder] = step.result
        assert step.result.is_relative_to(out)
    assert scored.pop("best") == ([1], [1])
    assert scored.pop("untrained") == ([10], [1])
    assert all(setting == ([10], [1, 5]) for setting in scored.values())
    assert set(scored) == {"depth", "upcycled"}


def test_titles_and_folders_are_unlike() -> None:
    steps = PIPELINE(Path("out"), 60, "sqlite:///x.db")
    for one, other in itertools.combinations(steps, 2):
        assert one.title != other.title
        assert one.folder != other.folder


def _steps(out: Path, words: dict[str, str], needs: dict[str, str]) -> list:
    """Steps that write what they are named for: a name -> what Python runs before it writes."""
    return [
        Step(
            title=name,
            command=[
                "python",
                "-c",
                f"{code}\nimport pathlib, sys\npathlib.Path(sys.argv[1]).mkdir(parents=True)\n"
                "pathlib.Path(sys.argv[1], 'result').write_text('made')",
                str(out / name),
            ],
            result=out / name / "result",
            folder=out / name,
            needs=tuple(out / read / "result" for read in needs.get(name, "").split()),
        )
        for name, code in words.items()
    ]


def test_steps_run_side_by_side_and_only_what_changed_is_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meet = (  # each of two steps waits for the other: they end only if they run side by side
        "import pathlib, time, sys; here = pathlib.Path(sys.argv[1]).parent; (here / '{0}').touch()\n"
        "while not (here / '{1}').exists(): time.sleep(0.01)\nprint('{0} met {1}')"
    )
    words = {"a": meet.format("x", "y"), "b": meet.format("y", "x"), "c": "print('third')"}
    needs = {"c": "a"}
    run_steps(_steps(tmp_path, words, needs), tmp_path, 2)
    shown = capsys.readouterr().out
    assert "1 | x met y" in shown
    assert "3 | third" in shown
    run_steps(_steps(tmp_path, words, needs), tmp_path, 2)
    assert capsys.readouterr().out.count("done before") == 3
    words["a"] = "print('anew')"
    (tmp_path / "kept").hardlink_to(tmp_path / "commands.json")
    before = (tmp_path / "kept").read_text()
    run_steps(_steps(tmp_path, words, needs), tmp_path, 2)
    assert (
        (tmp_path / "kept").read_text() == before != (tmp_path / "commands.json").read_text()
    )  # replaced, as a kill leaves it
    shown = capsys.readouterr().out
    assert shown.count("done before") == 1
    assert "1 | anew" in shown
    assert "3 | third" in shown


def test_a_step_that_fails_is_named_and_nothing_starts_after_it(tmp_path: Path) -> None:
    words = {"a": "raise SystemExit(3)", "b": ""}
    with pytest.raises(UserError, match=r"step 1 \(a\) ended with exit code 3"):
        run_steps(_steps(tmp_path, words, {"b": "a"}), tmp_path, 1)
    assert not (tmp_path / "b").exists()
