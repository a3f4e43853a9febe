"""Rehearsals of studies: everything but sizes is as it was, and the paper's studies pass from native sets to figures."""

import json
from pathlib import Path

import pytest

from dpt import cli
from dpt.config.checks import trained_model
from dpt.errors import UserError
from dpt.scaling.rehearsal import WATERMARK, rehearsal_of
from dpt.scaling.study import read_study

ROOT = Path(__file__).resolve().parents[2]
PAPER = sorted(path.name for path in (ROOT / "studies").glob("paper_*.yaml"))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("name", "devices"), [*((name, 0) for name in PAPER), ("paper_tables.yaml", 2)])
def test_every_launch_is_rehearsed_within_the_folder(name: str, devices: int, tmp_path: Path) -> None:
    study = read_study(Path("studies", name), uri="sqlite:///x.db")
    small = rehearsal_of(study, tmp_path, devices=devices)
    untrained = [launch for launch in small.launches if launch.stage == "untrained"]
    rehearsed = small.launches[len(untrained) :]
    assert [(one.name, one.launcher, one.recipe, one.stage) for one in rehearsed] == [
        (one.name, one.launcher, one.recipe, one.stage) for one in study.launches
    ]
    by_name = {launch.name: launch for launch in small.launches}
    for launch in small.launches:
        config = launch.resolved.dpt
        weights = config.evaluation.weights if launch.launcher == "evaluate" else config.training.weights
        shards = config.evaluation.data if launch.launcher == "evaluate" else config.data.shards
        places = [*shards, *([weights] if weights else []), launch.folder]
        assert all(Path(place).is_relative_to(tmp_path) for place in places)
        if launch.launcher != "evaluate":
            assert config.training.steps <= 8
            assert launch.resolved.deepspeed["train_batch_size"] == 2 * max(1, devices)
        if launch.parent:
            parent = by_name[launch.parent]
            assert Path(weights).is_relative_to(parent.folder)
            if Path(weights).parent.name == "checkpoints":
                assert 0 < int(Path(weights).name.removeprefix("step_")) <= parent.resolved.dpt.training.steps
            if launch.launcher != "evaluate":
                widths = [trained_model(one.resolved, one.launcher) for one in (parent, launch)]
                assert widths[0].hidden_size == widths[1].hidden_size
                assert widths[0].depth == widths[1].depth


def test_widths_still_grow_with_the_true_ones(tmp_path: Path) -> None:
    small = rehearsal_of(read_study(Path("studies/paper_model_size.yaml"), uri="sqlite:///x.db"), tmp_path, devices=0)
    widths = [one.resolved.dpt.model.hidden_size for one in small.launches if one.stage == "pretrain"]
    assert widths == sorted(widths)
    assert len(set(widths)) > 2


def test_what_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_study = read_study(Path("studies/small_model_size.yaml"), uri="sqlite:///x.db")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs/small/shards/class_rich is not a shard folder that is here"):
        rehearsal_of(small_study, tmp_path, devices=0)


def test_shards_behind_urls_are_read_as_they_are(tmp_path: Path) -> None:
    recipe, place = "ds_configs/quickstart_depth.json", "https://example.org/depth"
    (tmp_path / "own.yaml").write_text(
        f"stages: {{tuned: {{launcher: finetune, recipe: {recipe}, fields: {{data.shards: [{place}], training.weights: ''}}}}}}"
    )
    study = read_study(tmp_path / "own.yaml", uri="sqlite:///x.db")
    (launch,) = rehearsal_of(study, tmp_path, devices=0).launches
    config = launch.resolved.dpt
    assert config.data.shards == [place]
    assert config.model.input_size == study.launches[0].resolved.dpt.model.input_size
    assert config.model.hidden_size == 16


def test_options_that_contradict_it_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", "studies/paper_experts.yaml", "--rehearse", str(tmp_path), "--dry-run"])
    assert stop.value.code == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["paper_experts.yaml"], pytest.param(PAPER, marks=pytest.mark.slow)], ids=["one", "all"])
def test_paper_studies_pass_their_rehearsal(names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["study", *(f"studies/{name}" for name in names), "--rehearse", str(tmp_path), "--jobs", "2"])
    printed = capsys.readouterr().out
    for name in names:
        study = read_study(Path("studies", name), uri="sqlite:///x.db")
        for figure in study.figures:
            path = tmp_path / study.output / "figures" / f"{study.path.stem}_{figure.name}.svg"
            assert WATERMARK in path.read_text(encoding="utf-8")
            content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            assert content["watermark"] == WATERMARK
            assert content["points"]
        assert f"{WATERMARK} of studies/{name}" in printed
