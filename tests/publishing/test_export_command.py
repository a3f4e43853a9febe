"""`dpt export`: pipelines and cards from the command line."""

import json
from pathlib import Path

import pytest

from dpt import cli
from tests.publishing.small import export_small


def export(*arguments: object) -> int:
    try:
        return cli.main(["export", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)


def test_a_pipeline_has_its_defaults_and_a_card(tmp_path: Path) -> None:
    weights = export_small(tmp_path / "weights")
    out = tmp_path / "pipeline"
    options = ["--steps", 20, "--ensemble", 5, "--license", "mit", "--name", "lab/depth"]
    assert export(weights, out, "--to", "diffusers", *options) == 0
    index = json.loads((out / "model_index.json").read_text())
    assert (index["default_steps"], index["default_ensemble_size"]) == (20, 5)
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    files, folders = {"README.md", "model_index.json", "pipeline.py"}, {"scheduler", "transformer", "vae"}
    assert {p.name for p in out.iterdir()} == files | folders
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert 'from_pretrained("lab/depth", trust_remote_code=True)' in card


def test_class_names_come_from_a_file_and_what_opens_the_pipeline_exactly_is_said(tmp_path: Path, capsys) -> None:
    weights = export_small(tmp_path / "weights", task="class")
    (tmp_path / "names.txt").write_text("tench\nshark, great white\n")
    assert export(weights, tmp_path / "out", "--to", "diffusers", "--class-names", tmp_path / "names.txt") == 0
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["id2label"]["1"] == "shark, great white"
    said = capsys.readouterr().out
    assert (
        f'DiffusionPipeline.from_pretrained("{tmp_path / "out"}", custom_pipeline="pipeline", trust_remote_code=True)' in said
    )
    assert "timestep frequencies slightly off training's" in said


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = export_small(tmp_path / "weights", task="flow")
    (tmp_path / "bad.json").write_text('{"a": 1}')
    cases = [
        ((weights, tmp_path / "out", "--to", "diffusers"), "trained for flow"),
        (
            (weights, tmp_path / "out", "--to", "diffusers", "--ensemble", 0),
            "argument --ensemble: '0' is no whole number at least 1",
        ),
        ((weights, tmp_path / "out", "--to", "diffusers", "--ema-length", 0.1), "does not go with --to diffusers"),
        ((weights, tmp_path / "out", "--to", "diffusers", "--class-names", tmp_path / "bad.json"), "holds no list of texts"),
        ((weights, tmp_path / "out", "--to", "diffusers", "--run", "x", "--uri", "sqlite:///none.db"), "no MLflow store"),
    ]
    for arguments, words in cases:
        assert export(*arguments) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
