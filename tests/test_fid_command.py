"""`dpt fid` as a user meets it: against shards, recorded in MLflow below the training, bad input in one sentence."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np

from dpt import cli, tracking
from dpt.data.codec import load_vae
from dpt.data.manifest import file_sha256
from tests.evaluation.image_networks import Random, random_images, save_network
from tests.evaluation.tiny import calls_of
from tests.publishing.small import LINEAGE, export_small
from tests.shards import write_set
from tests.test_cli import refusal


def _shards(folder: Path, labels: list[int]) -> Path:
    codec, rng = load_vae(), np.random.default_rng(0)

    def make(number: int) -> dict[str, np.ndarray]:
        latents = rng.normal(0, 1 / codec.scaling_factor, (2, 4, 8, 8)).astype(np.float16)
        return {"label": np.array(labels[number]), "latents": latents}

    return write_set(folder, [len(labels)], make, resolution=64, vae=codec.record)


def _weights(folder: Path, task: str = "class") -> Path:
    return export_small(folder / task, task=task, num_classes=4 + (task != "class"))


def test_the_evaluator_scores_images_where_a_reference_is_named(tmp_path: Path, capsys, monkeypatch) -> None:
    path, sha256 = save_network(Random(), tmp_path / "features.pt")
    np.savez(tmp_path / "real.npz", random_images(9, 0, side=64))
    recipe = {"generation": {"reference": str(tmp_path / "real.npz"), "num_images": 5, "features": path}}
    recipe["generation"]["features_sha256"] = sha256
    recipe |= {"tracking": {"offline": True}, "evaluation": {"steps": [1], "output_dir": str(tmp_path / "out")}}
    (tmp_path / "recipe.json").write_text(json.dumps({"dpt": recipe}))
    launcher = Path(__file__).resolve().parents[1] / "launchers" / "evaluate.py"
    command = ["--ds_config", str(tmp_path / "recipe.json"), "--weights", str(_weights(tmp_path))]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *command])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(launcher), run_name="__main__")
    assert "Inception Score" in capsys.readouterr().out
    (spool,) = (tmp_path / "out" / "tracking").glob("*.jsonl")
    records = [json.loads(line) for line in spool.read_text().splitlines()]
    (start,) = [r for r in records if r["kind"] == "start"]
    (metrics,) = [r for r in records if r["kind"] == "metrics"]
    (dataset,) = [r for r in records if r["kind"] == "dataset"]
    assert (dataset["name"], dataset["context"]) == ("real.npz", "evaluation")
    assert dataset["digest"] == file_sha256(tmp_path / "real.npz")
    assert (start["stage"], start["parents"]) == ("evaluate", [LINEAGE["run_id"]])  # which nests it in MLflow
    figures = json.loads((tmp_path / "out" / "fid.json").read_text())["metrics"]
    assert {f"eval/class/{n}": v for n, v in figures.items()}.items() <= metrics["values"].items()


def test_fid_of_weights_against_shards(tmp_path: Path, capsys, monkeypatch) -> None:
    weights, shards = _weights(tmp_path), _shards(tmp_path / "shards", [0, 1, 1, 1, 3, 3])
    path, sha256 = save_network(Random(), tmp_path / "features.pt")
    network = ["--features", path, "--features-sha256", sha256]
    starts = calls_of(monkeypatch, tracking, "start_run")
    command = ["fid", str(weights), "--reference", str(shards), *network, "--num-images", "6", "--steps", "1"]
    command += ["--no-tracking", "--out", str(tmp_path / "out"), "--labels", "shares", "--guidance", "1.5"]
    assert cli.main(["--local_rank=0", *command]) == 0  # as the DeepSpeed launcher starts it
    printed = capsys.readouterr().out
    figures = ("FID", "sFID", "Inception Score", "precision", "recall")
    for words in (*figures, "guidance_scale 1.5", "sampler ddpm", "decoded latents"):
        assert words in printed
    assert (starts[0][1]["stage"], starts[0][1]["parents"]) == ("evaluate", [LINEAGE["run_id"]])
    summary = json.loads((tmp_path / "out" / "fid.json").read_text())
    assert summary["settings"]["reference"] == {"path": str(shards), "kind": "decoded latents", "num_images": 6}
    assert summary["settings"]["sampling"]["vae"] == "embedded"
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 6

    depth = _weights(tmp_path, "depth")
    np.savez(tmp_path / "small.npz", random_images(9, 0, side=32))
    np.savez(tmp_path / "fitting.npz", random_images(9, 0, side=64))
    for arguments, words in (
        ([*command[:1], str(depth), *command[2:]], "only class-conditional weights generate images"),
        ([*command, "--guidance", "3"], "made with guidance_scale 1.5, not 3.0"),
        ([*command, "--reference", str(tmp_path / "fitting.npz")], "shares of the labels are taken from class shards"),
        ([*command, "--reference", str(tmp_path / "small.npz"), "--labels", "balanced"], "32 x 32 pixels, for images of 64"),
        ([*command, "--reference", str(tmp_path / "none")], "none: no images there"),
        ([*command, "--features-sha256", "0" * 64], "its sha256 is"),
        ([*command, "--num-images", "2"], "precision and recall need more than 3 images"),
        ([*command, "--num-images", "1"], "num_images is 1; it must be at least 2"),
        ([*command, "--images", str(tmp_path)], "give weights to score, or ready-made pictures"),
        ([*command, "--save-reference", "x"], "must end in .npz"),
    ):
        error = refusal(capsys, *arguments)
        assert words in error
        assert error.count("\n") == 1
