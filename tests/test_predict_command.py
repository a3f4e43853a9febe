"""`dpt predict` over folders: every format, resumed after a stop, shared by ranks, what cannot be read is named."""

import dataclasses
import itertools
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpt import cli
from dpt.config.sections import EvaluationConfig
from dpt.errors import UserError
from dpt.evaluation import Predictor, predicting
from dpt.evaluation.frames import find_sources
from dpt.evaluation.predicting import predict_files
from tests.evaluation.tiny import calls_of, make_model, stop_at
from tests.gloo import run_ranks
from tests.test_cli import export_tiny, refusal


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures in folders, one of them turned by its EXIF orientation."""
    folder = tmp_path / "in"
    rng = np.random.default_rng(0)
    for name in ("a/one.png", "a/two.jpg", "b/deep/one.png", "three.png", "four.tif"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.open(folder / "a/two.jpg").save(folder / "a/two.jpg", exif=exif)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture either")
    return folder


def test_folders_in_every_format_and_what_cannot_be_read(pictures, tmp_path, capsys) -> None:
    weights = export_tiny(tmp_path, "depth", num_conditions=1)
    out = tmp_path / "out"
    (pictures / "b" / "broken.png").write_bytes(b"nothing")
    command = ["predict", str(pictures), "--weights", str(weights), "--steps", "1", "--out", str(out), "--batch", "2"]
    command += ["--formats", "npy,png16,colour,exr,ply", "--focal", "50"]
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "broken.png: not a picture that can be read" in printed.err
    assert "; 1 of 6 could not be predicted, the others are written." in printed.err
    (pictures / "empty.png").touch()
    errors = refusal(capsys, *command)
    for name in ("broken.png", "empty.png"):  # each by its name
        assert f"{name}: not a picture that can be read" in errors
    (pictures / "empty.png").unlink()
    written = sorted(Path(line) for line in printed.out.splitlines())
    assert len(written) == 25
    assert all(path.is_file() for path in written)
    assert np.load(out / "a" / "two_depth.npy").shape == (56, 40)  # upright
    assert {p.name for p in (out / "b" / "deep").iterdir()} == {
        f"one_depth{end}" for end in (".npy", ".png", "_colour.png", ".exr", ".ply")
    }
    assert not list(out.rglob("*.part"))

    (pictures / "a" / "worse.png").touch()
    named = refusal(capsys, *command)
    assert all(f"{name}.png: not a picture that can be read" in named for name in ("a/worse", "b/broken"))
    assert named.rstrip().endswith("2 of 7 could not be predicted, each named above; the others are written.")

    for path in ("a/worse.png", "b/broken.png"):
        (pictures / path).unlink()
    (out / "three_depth.npy").unlink()
    assert cli.main(command) == 0  # what is there stays
    printed = capsys.readouterr().out
    assert [Path(line).name.split("_")[0] for line in printed.splitlines()[:-1]] == ["three"] * 5
    assert "4 of 5 were already there" in printed
    assert cli.main([*command, "--steps", "2"]) == 0  # other settings: all anew
    assert len(capsys.readouterr().out.splitlines()) == 25
    assert cli.main([*command, "--ensemble", "2", "--pattern", "a/*.png", "--again"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7  # uncertainty too

    for more, words in (
        (["--formats", "tga"], "--formats tga: unknown"),
        (["--formats", "flo"], "--formats flo: predictions of depth are written as npy, png16"),
        (["--fov", "180"], "argument --fov: '180' is no number above 0 and below 180"),
        (["--depth-range", "3", "2"], "0 < NEAR < FAR"),
        (["--pattern", "*.exr"], r"no file like *.exr there"),
        (["--second", str(pictures / "three.png")], "each picture needs one second frame; 1 were given for 5"),
        (["--mask", str(pictures / "a")], "nothing there is named"),
    ):
        assert words in refusal(capsys, *command, *more)
    assert "there is no such file or folder" in refusal(capsys, "predict", tmp_path / "none", "--weights", weights)


def test_results_are_not_taken_for_pictures(pictures, monkeypatch) -> None:
    results = pictures / "predictions"
    results.mkdir()
    (pictures / "three.png").rename(results / "four_depth_colour.png")
    monkeypatch.chdir(pictures)
    found = find_sources([Path(".")], out=Path("predictions"))
    assert [s.name for s in found] == ["a/one", "a/two", "b/deep/one", "four"]
    assert len(find_sources([pictures], out=pictures.parent / "elsewhere")) == 5
    with pytest.raises(UserError, match="results beside the pictures of a folder"):
        find_sources([Path(".")], out=pictures)


def test_names_of_results_are_all_different(tmp_path) -> None:
    for name in ("x.png", "x.jpg", "x_0.png"):
        (tmp_path / name).touch()
    found = find_sources([tmp_path, tmp_path / "x.png"])
    assert {s.path.name: s.name for s in found[:3]} == {"x.jpg": "x_1", "x.png": "x_2", "x_0.png": "x_0"}
    assert found[3].name == "x_3"


def _predictor() -> Predictor:
    config = EvaluationConfig(batch_size=2, steps=[1])
    return Predictor(make_model(num_conditions=1), config=config, device="cpu")


def test_ranks_share_the_files_and_give_the_same(pictures, tmp_path) -> None:
    sources = find_sources([pictures])
    predict_files(_predictor(), sources, tmp_path / "one")
    ranks = run_ranks(2, lambda: [str(p) for p in predict_files(_predictor(), sources, tmp_path / "two", settings=[1]).written])
    assert all(ranks)
    assert not set(ranks[0]) & set(ranks[1])
    names = {p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.npy")}
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    again = predict_files(_predictor(), sources, tmp_path / "two", settings=[1])
    assert (again.skipped, again.written) == (5, [])


def test_a_stop_keeps_what_is_written_and_memory_is_bounded(pictures, tmp_path, monkeypatch) -> None:
    sources = find_sources([pictures])
    calls = calls_of(monkeypatch, Predictor, "__call__")
    stop_at(monkeypatch, predicting, 4)
    with pytest.raises(KeyboardInterrupt):
        predict_files(_predictor(), sources, tmp_path / "out", settings=[1])
    log = next((tmp_path / "out" / ".done").glob("*.jsonl"))
    with log.open("a") as file:  # and a line that the kill left torn
        file.write('[1.0, "four", [1], [')
    done = predict_files(_predictor(), sources, tmp_path / "out", settings=[1])
    assert done.skipped == 3
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 5
    assert max(len(images) for (_, images), _ in calls) <= 2
    # A picture that has changed since is predicted again.
    os.utime(pictures / "three.png", (1, 1))
    assert predict_files(_predictor(), sources, tmp_path / "out", settings=[1]).skipped == 4


def test_results_are_written_while_a_gpu_predicts_the_next(pictures, tmp_path, monkeypatch) -> None:
    sources, predictor = find_sources([pictures]), _predictor()
    predict_files(predictor, sources, tmp_path / "alone")
    predict, write, second, calls = Predictor.__call__, predicting.write_outputs, threading.Event(), itertools.count()

    def predicts(self, *args, **more):
        if next(calls) == 1:
            second.set()
        return predict(self, *args, **more)

    def writes(*args, **more):
        assert second.wait(timeout=60), "the second batch is not predicted before the first one is written"
        return write(*args, **more)

    monkeypatch.setattr(predicting, "threads_beside", lambda device: 4)
    monkeypatch.setattr(Predictor, "__call__", predicts)
    monkeypatch.setattr(predicting, "write_outputs", writes)
    done = predict_files(predictor, sources, tmp_path / "beside")
    alone = sorted((tmp_path / "alone").rglob("*_depth*"))
    assert sorted(done.written) == [tmp_path / "beside" / p.relative_to(tmp_path / "alone") for p in alone]
    assert all(p.read_bytes() == (tmp_path / "beside" / p.relative_to(tmp_path / "alone")).read_bytes() for p in alone)

    def fails(prediction, task, image, folder, name, **more):
        if folder.name == "a" and name == "one":  # the first
            raise OSError("no space left")
        return write(prediction, task, image, folder, name, **more)

    monkeypatch.setattr(predicting, "write_outputs", fails)
    with pytest.raises(OSError, match="no space left"):
        predict_files(predictor, sources, tmp_path / "full", settings=[1])
    monkeypatch.setattr(predicting, "write_outputs", write)
    assert predict_files(predictor, sources, tmp_path / "full", settings=[1]).skipped == 2  # those begun meanwhile


def test_a_picture_that_changes_while_it_is_predicted_is_predicted_again(pictures, tmp_path, monkeypatch) -> None:
    sources, write = find_sources([pictures / "three.png"]), predicting.write_outputs

    def write_late(*arguments, **options):
        os.utime(pictures / "three.png", (1, 1))
        return write(*arguments, **options)

    monkeypatch.setattr(predicting, "write_outputs", write_late)
    predict_files(_predictor(), sources, tmp_path / "out", settings=[1])
    assert predict_files(_predictor(), sources, tmp_path / "out", settings=[1]).skipped == 0


def test_flow_of_pairs_in_two_folders(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        for name in ("x", "y"):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / folder / f"{name}.png")
    Image.fromarray(rng.integers(0, 255, (16, 32, 3), dtype=np.uint8)).save(tmp_path / "second" / "y.png")
    predictor = Predictor(make_model("flow"), config=EvaluationConfig(steps=[1]), device="cpu")
    sources = find_sources([tmp_path / "first"])
    sources = [dataclasses.replace(s, other=tmp_path / "second" / f"{s.name}.png") for s in sources]
    done = predict_files(predictor, sources, tmp_path / "out")
    assert [p.name for p in done.written] == ["x_flow.flo", "x_flow.png"]
    assert done.failed == [f"{tmp_path / 'first' / 'y.png'} is of 32 x 32 pixels, its second frame of 32 x 16."]


@pytest.mark.parametrize("page", ["README.md", "docs/predicting.md"])
def test_the_five_lines_of_python_run(page, pictures, tmp_path) -> None:
    text = (Path(__file__).resolve().parents[1] / page).read_text(encoding="utf-8")
    block = text.split("From Python:\n\n")[1].split("\n\n")[0]
    code = "\n".join(line.removeprefix("    ") for line in block.splitlines())
    assert code.count("\n") == 4
    code = code.replace("runs/depth/weights", str(export_tiny(tmp_path, "depth", num_conditions=1)))
    code = code.replace("photo.jpg", str(pictures / "a" / "two.jpg")).replace("ensemble=5", "ensemble=1, steps=1")
    names: dict = {}
    exec(code, names)
    assert names["depth"].shape == (56, 40)
    assert names["depth"].dtype == np.float32
