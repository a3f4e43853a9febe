"""`examples/` and docs/own_task.md do what they say, as they stand."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpt import cli
from dpt.config.sections import TrackingConfig
from dpt.errors import UserError
from dpt.plugins import load_plugins
from dpt.tracking import start_run
from dpt.tracking.read import load_runs
from dpt.tracking.sender import sync
from tests.gloo import load_libraries, run_script
from tests.test_cli import export_tiny

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "own_task.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """The code of the page under the mark `name`."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def run(path: Path, *arguments: str) -> str:
    """What a script prints."""
    log = Path("log")
    assert run_script(log, str(path), *arguments) == 0, log.read_text()
    return log.read_text()


def pairs(folder: Path, count: int = 4) -> Path:
    """Pictures with normals of three channels."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(random.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        normals = random.normal(size=(3, 48, 64)).astype(np.float32)
        normals /= np.linalg.norm(normals, axis=0)
        normals[:, :4] = 0
        np.save(folder / f"{number}.npy", normals)
    return folder


def test_a_task_of_ones_own_from_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("normals.py")
    body = code.split('"""', 2)[2]
    lines = [line for line in body.splitlines() if line.strip() and not line.startswith(("from", "import"))]
    assert len(lines) <= 30
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    Path("normals.py").write_text(code)
    Path("normals.json").write_text(block("normals.json"))
    pairs(Path("DATA/train"), 8)
    pairs(Path("DATA/val"), 2)
    export, *commands = block("commands").splitlines()
    name, _, value = export.removeprefix("export ").partition("=")
    monkeypatch.setenv(name, value)
    for command in commands:
        words = shlex.split(command)
        if words[0] == "dpt":
            run(ROOT / "dpt" / "cli.py", *words[1:])
        elif words[1] == "-m":
            run(ROOT / "data_tools" / "encode.py", *words[3:])
        else:
            run(ROOT / words[1], *words[2:])
    figures = json.loads(Path("runs/normals/evaluation/summary.json").read_text())["sets"]["my_normals_val"]
    assert 0 < figures["results"][0]["metrics"]["angle"] < 180
    assert figures["ceiling"]["within_11"] >= 0
    assert len(list(Path("runs/normals/evaluation/my_normals_val/pictures").glob("*.png"))) == 4
    predicted = np.load("predictions/0_normals.npy")
    np.testing.assert_allclose(np.linalg.norm(predicted, axis=0), 1.0, atol=1e-3)
    assert Image.open("predictions/0_normals.png").size == (64, 48)
    training, evaluation = sorted(load_runs("sqlite:///mlflow.db"), key=lambda run: run.stage, reverse=True)
    assert (training.stage, evaluation.stage) == ("finetune", "evaluate")
    assert evaluation.tags["mlflow.parentRunId"] == training.mlflow_run_id
    assert evaluation.metrics["eval/normals/angle"] == pytest.approx(figures["results"][0]["metrics"]["angle"])


def test_plugins_that_fail_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPT_PLUGINS", str(tmp_path / "nothing_there.py"))
    with pytest.raises(UserError, match=r"DPT_PLUGINS: .*nothing_there\.py cannot be loaded"):
        load_plugins()
    (tmp_path / "taken.py").write_text(
        "from dpt.tasks import *\nregister_task(TaskSpec(name='depth', conditions=('rgb',), targets=('x',)))"
    )
    monkeypatch.setenv("DPT_PLUGINS", str(tmp_path / "taken.py"))
    with pytest.raises(UserError, match="task 'depth' already exists"):
        load_plugins()


def test_predicting_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = export_tiny(tmp_path, "depth", num_conditions=1)
    pairs(Path("in"), 2)
    printed = run(ROOT / "examples" / "predict.py", str(weights), "in/0.png", "in/1.png")
    assert printed.count("uncertain by") == 2
    assert np.load("in/1_depth.npy").shape == (48, 64)


def test_training_on_own_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_libraries()  # and let the run keep its records: nothing here is about MLflow
    monkeypatch.setattr("dpt.training.session.start_run", lambda config, **run: start_run(replace(config, offline=True), **run))
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for number in range(4):
        picture = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).save(f"in/{number}.png")
        np.save(f"in/{number}.npy", 1 + picture[..., 0] / 64)
    np.save("in/0_depth.npy", np.zeros((64, 64), np.float32))  # as examples/predict.py writes it
    printed = run(ROOT / "examples" / "train_own_pairs.py", "in", "out")
    assert "step 20/20" in printed
    assert (Path("out") / "run" / "weights" / "config.json").is_file()


def test_comparing_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrackingConfig(uri="sqlite:///mlflow.db", offline=True)
    for name, rate in (("slow", 0.1), ("fast", 0.2)):
        options = {"stage": "pretrain", "name": name, "params": {"lr": rate, "seed": 1}, "parents": [], "tags": {}}
        with start_run(config, output_dir=tmp_path / name, **options) as tracked:
            for step in (1, 2):
                tracked.log_metrics({"train/loss": rate * step}, step)
    assert [problem for _, problem in sync(tmp_path)] == ["", ""]
    printed = run(ROOT / "examples" / "compare_runs.py", "sqlite:///mlflow.db", "slow", "fast")
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    assert rows["run"] == ["slow", "fast"]
    assert rows["lr"] == ["0.1", "0.2"]
    assert rows["train/loss"] == ["0.2", "0.4"]
    assert "seed" not in rows
    assert cli.COMMANDS["compare"]
