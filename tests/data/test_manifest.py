"""The manifest: round trip, refusals in one sentence, atomic writing."""

import dataclasses
import json
from pathlib import Path

import pytest

from dpt.data.manifest import VAERecord, check_manifests, read_manifest, write_manifest
from dpt.errors import UserError


def test_round_trip(make_shards, tmp_path: Path) -> None:
    manifest = read_manifest(make_shards([3, 2], class_names=("cat", "dog"), statistics={"latents": {"mean": [0.5]}}))
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.num_samples == 5
    assert manifest.members["latents"].shape == (2, 4, 4, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_data_hash_follows_the_shards(make_shards) -> None:
    one, same, other = (read_manifest(make_shards(counts)) for counts in ([3, 2], [3, 2], [2, 3]))
    assert one.data_sha256 == same.data_sha256 != other.data_sha256


def test_sets_must_fit_each_other(make_shards) -> None:
    base = read_manifest(make_shards([3]))

    def check(**changes: object) -> None:
        check_manifests({"set0": base, "set1": dataclasses.replace(base, **changes)})  # type: ignore[arg-type]

    check(task="depth")
    with pytest.raises(UserError, match='set1: the latents were made by VAE "v", not by "tiny" of set0'):
        check(vae=VAERecord(name="v", sha256="b" * 64, scaling_factor=1.0, latent_channels=4))
    with pytest.raises(UserError, match=r"shift_factor 0\.5, not 0\.0"):
        check(vae=dataclasses.replace(base.vae, shift_factor=0.5))
    with pytest.raises(UserError, match="512 px but set0 has 32 px"):
        check(resolution=512)


def test_missing_empty_and_unfinished_folders(make_shards, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such shard folder"):
        read_manifest(tmp_path / "none")
    with pytest.raises(UserError, match="the shard folder is empty"):
        read_manifest(tmp_path)
    folder = make_shards([1])
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="its encoding is not finished"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 99}, "format_version is 99"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"vae": {"name": "x"}}, "missing"),
        ({"num_samples": 7}, "not the sum"),
        ({"shards": [], "num_samples": 0}, "no samples"),
        ({"task": "sleep"}, "'sleep' is unknown"),
        ({"num_skipped": 3}, "num_skipped"),
        ({"shards": [{"name": "../x.tar", "num_samples": 3, "sha256": "", "bytes": 1}]}, "a path"),
    ],
)
def test_broken_manifests(make_shards, change: dict, words: str) -> None:
    path = make_shards([3]) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=words) as caught:
        read_manifest(path.parent)
    assert str(path) in str(caught.value)


def test_broken_json(make_shards) -> None:
    path = make_shards([3]) / "manifest.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match=r"not valid JSON: .* line"):
        read_manifest(path.parent)
