"""`dpt push` against a stand-in of the hub: what arrives, what is refused, and that the token is shown nowhere."""

import json
import logging
from pathlib import Path

import pytest
from fake_hub import TOKEN, Hub

from dpt import cli
from dpt import hub as hubs
from dpt.data.codec import load_vae
from dpt.embedded import EMBEDDED_VAES
from dpt.models.pretrained import read_weights
from dpt.publishing.pipelines import write_pipeline
from tests.publishing.small import export_small


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return export_small(tmp_path / "weights")


def push(*arguments: object) -> None:
    assert cli.main(["push", *map(str, arguments)]) == 0


def test_what_is_pushed_is_read_by_its_name(
    hub: Hub, weights: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    (weights / ".cache").mkdir()
    (weights / ".cache" / "junk").write_text("x")
    push(weights, "lab/depth", "--private", "--license", "apache-2.0", "--message", "First")
    repo = hub.repos["lab/depth"]
    files = repo.commits[repo.branches["main"]]
    assert set(files) == {".gitattributes", "README.md", "config.json", "weights.safetensors"}
    assert repo.private
    assert repo.messages[-1] == "First"
    assert b"license: apache-2.0" in files["README.md"]
    assert b'Predictor("hub:lab/depth")' in files["README.md"]
    ours, theirs = read_weights(weights), read_weights("hub:lab/depth")
    assert all((ours.state[name] == tensor).all() for name, tensor in theirs.state.items())
    commit = repo.branches["main"]
    assert theirs.sections["lineage"]["weights"] == f"hub:lab/depth@{commit}"
    printed = "".join(capsys.readouterr())
    assert f"/lab/depth/commit/{commit}" in printed
    assert any(sent == f"Bearer {TOKEN}" for _, _, sent in hub.requests)
    assert TOKEN not in printed + caplog.text
    assert not any(TOKEN.encode() in content for content in files.values())


def test_a_pipeline_brings_its_own_vae_here_and_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    weights = export_small(tmp_path / "class", task="class", timestep_features="diffusers", mlp_norm_eps=1e-5)
    out = tmp_path / "pipeline"
    write_pipeline(read_weights(weights), out, source="weights")
    assert read_weights(out).sections["vae"]["name"] == str(out / "vae")
    hub.add("lab/class", out)
    hub.add("lab/more", tmp_path)
    for name in ("hub:lab/class", "hub:lab/more/pipeline"):
        vae = read_weights(name).sections["vae"]["name"]
        repo, _, commit = vae.partition("@")
        assert repo == f"{name}/vae"
        assert len(commit) == 40
        assert load_vae(vae).sha256 == load_vae().sha256
    assert cli.main(["import", "hub:lab/class", str(tmp_path / "imported")]) == 0
    found = json.loads((tmp_path / "imported" / "config.json").read_text())["vae"]
    assert (found["name"], found["sha256"]) == (read_weights("hub:lab/class").sections["vae"]["name"], load_vae().sha256)


def test_a_branch_is_made_and_a_model_that_is_there_is_updated(hub: Hub, weights: Path) -> None:
    push(weights, "lab/depth")
    first = hub.repos["lab/depth"].branches["main"]
    config = json.loads((weights / "config.json").read_text())
    (weights / "notes.txt").write_text("more")
    push(weights, "lab/depth@v2")
    push(weights, "lab/depth", "--branch", "v2")
    branches = hub.repos["lab/depth"].branches
    assert branches["main"] == first
    assert "notes.txt" in hub.repos["lab/depth"].commits[branches["v2"]]
    assert json.loads((hubs.local_path("hub:lab/depth@v2") / "config.json").read_text()) == config


def test_a_runs_folder_is_taken_as_its_weights(hub: Hub, weights: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    weights.rename(run / "weights")
    (run / "records.jsonl").write_text("")
    push(run, "lab/depth")
    repo = hub.repos["lab/depth"]
    assert set(repo.commits[repo.branches["main"]]) == {".gitattributes", "README.md", "config.json", "weights.safetensors"}


def test_refusals_are_one_sentence_without_the_token(
    hub: Hub, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused
) -> None:
    from huggingface_hub import constants

    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ((tmp_path / "empty", "lab/depth"), "neither exported weights nor a pipeline"),
        ((weights, "depth"), "is no name on the hub"),
        ((weights, "lab/depth@v1", "--revision", "v2"), "a branch once"),
        ((weights, "lab/depth", "--uri", f"sqlite:///{tmp_path / 'none.db'}"), "there is no MLflow store here"),
    ):
        assert words in refused(cli.main, "push", *arguments)
    wrong = "hf_anotherTokenOfTheTests"
    monkeypatch.setenv("HF_TOKEN", wrong)
    said = refused(cli.main, "push", weights, "lab/depth")
    assert "refuses to write with this token" in said
    assert wrong not in said
    monkeypatch.setenv("HF_TOKEN", "")
    assert "nobody is logged in" in refused(cli.main, "push", weights, "lab/depth")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(cli.main, "push", weights, "lab/depth")
    assert hub.repos == {}


def test_an_error_that_carries_the_token_does_not_show_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TOKEN not in hubs.one_line(OSError(f"Authorization: Bearer {TOKEN}\n failed"))


def test_a_vae_of_the_hub_is_named_with_its_class_and_commit(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("lab/vae", EMBEDDED_VAES["embedded"])
    write_pipeline(read_weights(export_small(tmp_path / "weights")), tmp_path / "out", source="weights", vae="lab/vae")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert (index["vae_name"], index["vae_revision"], index["vae_class"]) == ("lab/vae", commit, "AutoencoderKL")
    assert not (tmp_path / "out" / "vae").exists()
    assert read_weights(tmp_path / "out").sections["vae"]["name"] == f"hub:lab/vae@{commit}"


def test_a_pipeline_whose_vae_cannot_be_read_is_imported_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = export_small(tmp_path / "class", task="class", timestep_features="diffusers", mlp_norm_eps=1e-5)
    out = write_pipeline(read_weights(weights), tmp_path / "pipeline", source="weights")
    (out / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert cli.main(["import", str(out), str(tmp_path / "imported")]) == 0
    assert "the pipeline's own vae is left out: VAE" in capsys.readouterr().out
    assert "vae" not in json.loads((tmp_path / "imported" / "config.json").read_text())
