"""Names of the hub become files of its cache: one resolver for weights, VAEs and image towers."""

from pathlib import Path

import pytest
from fake_hub import Hub, Repo, used

from dpt import hub as hubs
from dpt.errors import UserError
from tests.test_cli import refusal


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with used(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def model(hub: Hub, **more: bytes) -> str:
    files = {"config.json": b"{}", "weights.safetensors": b"numbers", "README.md": b"words", "figure.png": b"big", **more}
    return hub.repos.setdefault("lab/depth", Repo()).commit(files)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hub:lab/depth", ("lab/depth", "", "")),
        ("hub:lab/depth@v1.0", ("lab/depth", "", "v1.0")),
        ("hub:lab/depth@refs/pr/2", ("lab/depth", "", "refs/pr/2")),
        ("hub:lab/depth/vae@main", ("lab/depth", "vae", "main")),
        ("hub:lab/depth/a/b.pt", ("lab/depth", "a/b.pt", "")),
    ],
)
def test_a_name_has_a_model_a_path_and_a_revision(text: str, parts: tuple[str, str, str]) -> None:
    name = hubs.parse(text)
    assert (name.repo, name.path, name.revision) == parts
    assert str(name) == text


@pytest.mark.parametrize("text", ["hub:", "hub:depth", "hub:lab/", "hub:lab/x@", "hub:lab/../x", "hub:lab/de pth", "lab/x"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write hub:owner/name"):
        hubs.parse(text)


def test_paths_stay_paths() -> None:
    assert hubs.local_path("runs/x/weights") == Path("runs/x/weights")
    assert hubs.pinned("runs/x/weights") == "runs/x/weights"


def test_a_name_is_fetched_once_with_what_weights_need_and_pinned_to_its_commit(hub: Hub) -> None:
    commit = model(hub)
    folder = hubs.local_path("hub:lab/depth")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "weights.safetensors"]
    assert hubs.pinned("hub:lab/depth") == f"hub:lab/depth@{commit}"
    assert len(hub.downloads()) == 2


def test_a_revision_and_a_path_choose(hub: Hub) -> None:
    old = model(hub)
    vae = {"vae/config.json": b"{}", "vae/diffusion_pytorch_model.safetensors": b"v"}
    new = model(hub, **{"weights.safetensors": b"other", **vae})
    assert (hubs.local_path(f"hub:lab/depth@{old}") / "weights.safetensors").read_bytes() == b"numbers"
    assert (hubs.local_path(f"hub:lab/depth@{new}") / "weights.safetensors").read_bytes() == b"other"
    folder, name = hubs.resolve("hub:lab/depth/vae", hubs.VAE_FILES)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert name == f"hub:lab/depth/vae@{new}"
    assert hubs.local_path("hub:lab/depth/weights.safetensors").read_bytes() == b"other"


def test_pickles_are_taken_only_where_there_are_no_safetensors(hub: Hub) -> None:
    old = {"transformer/config.json": b"{}", "transformer/diffusion_pytorch_model.bin": b"x"}
    hub.repos["lab/old"] = Repo()
    hub.repos["lab/old"].commit({"model_index.json": b"{}", **old})
    assert (hubs.local_path("hub:lab/old") / "transformer/diffusion_pytorch_model.bin").is_file()
    hub.repos["lab/new"] = Repo()
    hub.repos["lab/new"].commit({**old, "transformer/diffusion_pytorch_model.safetensors": b"x"})
    assert not (hubs.local_path("hub:lab/new") / "transformer/diffusion_pytorch_model.bin").exists()


def test_offline_the_cache_is_enough_and_what_it_lacks_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = model(hub)
    online = hubs.local_path("hub:lab/depth")
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hubs.local_path("hub:lab/depth") == online
    assert hubs.pinned("hub:lab/depth") == f"hub:lab/depth@{commit}"
    with pytest.raises(UserError, match=r"lab/other: not, .* this machine's cache, .*`hf download lab/other"):
        hubs.local_path("hub:lab/other")
    with pytest.raises(UserError, match=r"hf download lab/depth --revision v2"):
        hubs.local_path("hub:lab/depth@v2")
    assert len(hub.requests) == asked


def test_each_way_of_not_being_there_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    model(hub)
    hub.repos["lab/gated"] = Repo(gated=True)
    hub.repos["lab/empty"] = Repo()
    hub.repos["lab/empty"].commit({"README.md": b"x"})
    for name, words in {
        "hub:lab/none": "hub:lab/none: the hub has no model lab/none",
        "hub:lab/depth@v9": "lab/depth has no branch, tag or commit v9",
        "hub:lab/gated": "grants access on request",
        "hub:lab/empty": "has no config.json",
        "hub:lab/depth/vae": "has no vae",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            hubs.local_path(name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(UserError, match=r"hub:lab/far: the hub at http://127.0.0.1:9 cannot be reached"):
        hubs.local_path("hub:lab/far")


@pytest.mark.parametrize("name", ["hub:lab/vae", "lab/vae"])
def test_a_vae_of_the_hub_says_which_commit_it_is(hub: Hub, name: str) -> None:
    from dpt.data.codec import load_vae
    from dpt.embedded import EMBEDDED_VAES

    commit = hub.add("lab/vae", EMBEDDED_VAES["embedded"])
    codec = load_vae(name)
    assert codec.name == f"hub:lab/vae@{commit}"
    assert codec.sha256 == load_vae().sha256


def test_a_command_ends_with_one_sentence_and_exit_code_2(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "sample", "--weights", "hub:lab/none@v2", "--labels", "1")
    assert said.startswith("dpt sample: error: hub:lab/none@v2: the hub has no model lab/none")
    assert said.count("\n") == 1
