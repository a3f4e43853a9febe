"""Writing synthetic data sets, and reading them back through the readers of the real ones."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.readers import open_reader
from data_tools.synthesis import CLASS_NAMES, make_scene, render
from data_tools.synthesis import dataset as synthesis_dataset
from data_tools.synthesis.__main__ import main
from data_tools.synthesis.dataset import DESCRIPTION, SynthesisConfig, synthesize
from data_tools.synthesis.layouts import TASKS
from dpt.errors import UserError
from tests.data_tools.encode_runs import contents

CONFIG = SynthesisConfig(scenes=12, size=32, seed=5, splits={"train": 0.5, "val": 0.25, "test": 0.25})
COUNTS = {"train": 6, "val": 3, "test": 3}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthesis") / "scenes"
    assert synthesize(out, CONFIG, workers=1)
    return out


@pytest.mark.parametrize("split", COUNTS)
@pytest.mark.parametrize("task", TASKS)
def test_the_readers_of_the_real_sets_return_the_scenes(written: Path, task: str, split: str) -> None:
    reader = open_reader(TASKS[task], written / TASKS[task], split)
    assert reader.task == task
    keys = reader.keys()
    assert len(keys) == COUNTS[split]
    truths = [render(make_scene(5, split, index), 32) for index in range(COUNTS[split])]
    if task == "class":  # the folders sort by class first
        order = sorted(range(len(truths)), key=lambda index: (truths[index].class_name, index))
        truths = [truths[index] for index in order]
    for key, truth in zip(keys, truths, strict=True):
        sample = reader.read(key)
        np.testing.assert_array_equal(sample.images[0], truth.image)
        if task == "class":
            assert (sample.class_name, sample.label) == (truth.class_name, truth.label)
        if task == "depth":
            assert np.abs(sample.depth - truth.depth).max() <= 0.00051
            assert sample.valid.all()
        if task == "flow":
            np.testing.assert_array_equal(sample.images[1], truth.next_image)
            np.testing.assert_array_equal(sample.flow, truth.flow)
        if task == "amodal":
            np.testing.assert_array_equal(sample.images[1][..., 0] == 255, truth.visible_mask)
            np.testing.assert_array_equal(sample.mask, truth.whole_mask)
            np.testing.assert_array_equal(sample.whole, truth.whole)


def test_splits_show_different_scenes(written: Path) -> None:
    readers = [open_reader("flying_chairs", written / "flying_chairs", split) for split in COUNTS]
    pictures = {reader.read(key).images[0].tobytes() for reader in readers for key in list(reader.keys())}
    assert len(pictures) == 12


def test_the_description_states_the_parameters(written: Path) -> None:
    description = json.loads((written / DESCRIPTION).read_text())
    assert description["counts"] == COUNTS
    assert description["class_names"] == list(CLASS_NAMES)
    assert {name: description[name] for name in ("scenes", "size", "seed")} == {"scenes": 12, "size": 32, "seed": 5}


def test_a_finished_set_is_reused_and_another_is_refused(written: Path, refused) -> None:
    before = (written / DESCRIPTION).stat().st_mtime_ns
    assert not synthesize(written, CONFIG)
    assert (written / DESCRIPTION).stat().st_mtime_ns == before
    arguments = ["--out", str(written), "--scenes", "13", "--size", "32", "--seed", "5"]
    assert "other scenes" in refused(main, *arguments, "--splits", "train=0.5,val=0.25,test=0.25")


def test_processes_and_leftovers_change_nothing(written: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".again.partial"
    leftover.mkdir()
    (leftover / "stale").write_text("from a run that was stopped")
    assert synthesize(tmp_path / "again", CONFIG, workers=2)
    assert contents(tmp_path / "again") == contents(written)
    assert not leftover.exists()


def test_a_stopped_run_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_tools.synthesis.dataset.write_lists", stop)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "set", CONFIG, workers=1)
    assert not (tmp_path / "set").exists()


def test_a_stopped_run_goes_on_and_other_parameters_begin_anew(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []
    write_scene = synthesis_dataset.write_scene

    def stops_at_the_fourth(root: Path, tasks: object, split: str, number: int, rendered: object) -> None:
        asked.append(number)
        if len(asked) == 4:
            raise KeyboardInterrupt
        write_scene(root, tasks, split, number, rendered)

    monkeypatch.setattr(synthesis_dataset, "write_scene", stops_at_the_fourth)
    out = tmp_path / "scenes"
    with pytest.raises(KeyboardInterrupt):
        synthesize(out, CONFIG, workers=1)
    with (tmp_path / ".scenes.partial" / "written.txt").open("a") as record:
        record.write("99")  # a line that was being written
    asked[:] = [0] * 5
    assert synthesize(out, CONFIG, workers=1)
    assert asked[5:] == list(range(3, CONFIG.scenes))
    assert f"3 of {CONFIG.scenes} scenes are there" in capsys.readouterr().out
    assert contents(out) == contents(written)
    other = dataclasses.replace(CONFIG, seed=CONFIG.seed + 1)
    asked[:] = [0]
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "other", CONFIG, workers=1)
    asked[:] = [0] * 5
    synthesize(tmp_path / "other", other, workers=1)
    assert asked[5:] == list(range(CONFIG.scenes))


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="no synthetic data set"):
        synthesize(tmp_path, CONFIG)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_rich_set_holds_other_scenes(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(CONFIG, variety="rich")
    with pytest.raises(UserError, match="other variety"):
        synthesize(written, config, workers=1)
    synthesize(tmp_path / "rich", config, workers=1)
    pictures = [sorted((root / "imagenet").rglob("*.png")) for root in (written, tmp_path / "rich")]
    assert len(pictures[0]) == len(pictures[1])
    assert not {path.read_bytes() for path in pictures[0]} & {path.read_bytes() for path in pictures[1]}


def test_only_the_tasks_asked_for_are_written(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "set"), "--scenes", "10", "--size", "16", "--tasks", "flow", "--workers", "1"]) == 0
    assert {path.name for path in (tmp_path / "set").iterdir()} == {DESCRIPTION, "flying_chairs"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--size", "100"], "size is 100"),
        (["--tasks", "depth,normals"], "normals"),
        (["--splits", "train=0.9"], "sum to 1"),
        (["--splits", "train"], "NAME=SHARE"),
        (["--splits", "dev=1.0"], "dev"),
        (["--scenes", "3"], "empty"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_bad_options_end_with_one_sentence(tmp_path: Path, refused, options: list[str], named: str) -> None:
    assert named in refused(main, "--out", tmp_path / "set", *options)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=50, deadline=None)
@given(scenes=st.integers(20, 5000), share=st.floats(0.1, 0.9))
def test_every_scene_is_in_exactly_one_split(scenes: int, share: float) -> None:
    counts = SynthesisConfig(scenes=scenes, splits={"val": share, "train": 1 - share}).counts()
    assert list(counts) == ["train", "val"]
    assert sum(counts.values()) == scenes
    assert min(counts.values()) >= 1
