"""`dpt export`: pipelines and cards from the command line."""

import json
from pathlib import Path

from dpt import cli
from tests.publishing.small import export_small


def export(*arguments: object) -> None:
    assert cli.main(["export", *map(str, arguments)]) == 0


def test_a_pipeline_has_its_defaults_and_a_card(tmp_path: Path) -> None:
    weights = export_small(tmp_path / "weights")
    out = tmp_path / "pipeline"
    options = ["--steps", 20, "--ensemble", 5, "--license", "mit", "--name", "lab/depth"]
    export(weights, out, "--to", "diffusers", *options)
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
    export(weights, tmp_path / "out", "--to", "diffusers", "--class-names", tmp_path / "names.txt")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["id2label"]["1"] == "shark, great white"
    said = capsys.readouterr().out
    assert f'.from_pretrained("{tmp_path / "out"}", custom_pipeline="pipeline", trust_remote_code=True)' in said
    assert "timestep frequencies slightly off training's" in said


def test_bad_input_is_one_sentence(tmp_path: Path, refused) -> None:
    weights, out = export_small(tmp_path / "weights", task="flow"), tmp_path / "out"
    (tmp_path / "bad.json").write_text('{"a": 1}')
    for options, words in (
        ((), "trained for flow"),
        (("--ensemble", 0), "argument --ensemble: '0' is no whole number at least 1"),
        (("--ema-length", 0.1), "does not go with --to diffusers"),
        (("--class-names", tmp_path / "bad.json"), "holds no list of texts"),
        (("--run", "x", "--uri", "sqlite:///none.db"), "no MLflow store"),
    ):
        assert words in refused(cli.main, "export", weights, out, "--to", "diffusers", *options)
    assert not out.exists()
