"""Shards: the same bytes every time, read back whole, by plain tar, by stock webdataset, and when damaged."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt.data.manifest import Manifest, file_sha256, read_manifest
from dpt.data.reader import BLOCK, SampleError, ShardReader
from dpt.data.shards import ShardFolder


def random_sample(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "target_latents": random.normal(size=(1, 2, 4, 2, 2)).astype(np.float16),
        "cond_latents": random.normal(size=(2, 2, 4, 2, 2)).astype(np.float16),
        "valid": random.integers(0, 2, (2, 2)).astype(np.uint8),
        "clip": random.normal(size=1100).astype(np.float32),
    }


def test_round_trip_and_order_of_members(make_shards) -> None:
    folder = make_shards([4, 3], random_sample, task="depth")
    with tarfile.open(folder / "000001.tar") as tar:
        names = tar.getnames()
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}
    assert names[:5] == [
        f"s00004.{m}" for m in ("valid.npy", "clip.npy", "cond_latents.npy", "target_latents.npy", "meta.json")
    ]
    samples = list(ShardFolder(folder))[2:]
    assert [s["key"] for s in samples] == [f"s{i:05d}" for i in range(2, 7)]
    for number, sample in enumerate(samples, 2):
        assert sample["meta"] == {"number": number}
        for name, array in random_sample(number).items():
            np.testing.assert_array_equal(sample[name], array)
    assert len(ShardFolder(folder)) == 7


def test_same_bytes_every_time(make_shards) -> None:
    one, other = make_shards([5], random_sample, task="depth"), make_shards([5], random_sample, task="depth")
    assert (one / "000000.tar").read_bytes() == (other / "000000.tar").read_bytes()
    manifest = ShardFolder(one).manifest.shards[0]
    assert manifest.sha256 == file_sha256(one / "000000.tar")
    assert manifest.bytes == (one / "000000.tar").stat().st_size


def test_tar_and_stock_webdataset_read_them(make_shards) -> None:
    folder = make_shards([3, 2])
    listed = subprocess.run(["tar", "tf", folder / "000000.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split()[:3] == ["s00000.label.npy", "s00000.latents.npy", "s00000.meta.json"]
    assert listed.stderr == ""
    dataset = wds.WebDataset(f"{folder}/{{000000..000001}}.tar", shardshuffle=False).decode()
    samples = list(dataset.to_tuple("latents.npy", "label.npy", "meta.json"))
    assert [int(label) for _, label, _ in samples] == [0, 1, 2, 3, 4]
    assert samples[4][0].shape == (2, 4, 4, 4)
    assert samples[4][2] == {"number": 4}


def test_samples_of_differing_size(make_shards) -> None:
    def sample(number: int) -> dict[str, np.ndarray]:
        return {"image": np.full((number + 1, 700, 3), number, np.uint8), "label": np.array(number, np.int64)}

    folder = make_shards([4], sample)
    assert [s["image"].shape[0] for s in ShardFolder(folder)] == [1, 2, 3, 4]
    assert [int(s["label"]) for s in ShardFolder(folder)] == [0, 1, 2, 3]


def read_all(path: Path, count: int, manifest: Manifest) -> list[int | str]:
    """Labels of the samples of a shard that should be the first of `manifest`, or why they cannot be read."""
    reader = ShardReader(path.open("rb"), str(path), manifest.shards[0], manifest.members)
    found: list[int | str] = []
    for row in range(count):
        try:
            found.append(int(reader.sample(row)["label"]))
        except SampleError as error:
            found.append(str(error))
    reader.close()
    return found


@settings(max_examples=30)
@given(st.data())
def test_damaged_headers_cost_their_sample_only(make_shards, data) -> None:
    path = make_shards([6]) / "000000.tar"
    manifest = read_manifest(path.parent)
    content = bytearray(path.read_bytes())
    stride = (len(content) - 1024) // 6
    row = data.draw(st.integers(0, 5))
    content[row * stride : row * stride + BLOCK] = os.urandom(BLOCK)
    path.write_bytes(content)
    found = read_all(path, 6, manifest)
    assert [found[i] for i in range(6) if i != row] == [i for i in range(6) if i != row]
    assert "damaged" in str(found[row])


@given(st.floats(0.0, 0.999))
@settings(max_examples=30)
def test_truncated_tars_keep_their_whole_samples(make_shards, share: float) -> None:
    path = make_shards([5]) / "000000.tar"
    content = path.read_bytes()
    stride = (len(content) - 1024) // 5
    cut = int(len(content) * share)
    path.write_bytes(content[:cut])
    whole = min(cut // stride, 5)
    try:
        found = read_all(path, 5, read_manifest(path.parent))
    except SampleError:
        found = ["unreadable"] * 5
    assert found[:whole] == list(range(whole))
    assert all(isinstance(item, str) for item in found[whole:])


def test_pickles_are_refused(make_shards, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("k.label.npy")
        info.size = len(buffer.getvalue())
        tar.addfile(info, io.BytesIO(buffer.getvalue()))
    assert "damaged" in str(read_all(tmp_path / "0.tar", 1, read_manifest(make_shards([1])))[0])


def test_tars_of_other_programs(make_shards, tmp_path: Path) -> None:
    folder = make_shards([4])
    subprocess.run(["tar", "xf", folder / "000000.tar", "-C", tmp_path], check=True)
    names = sorted(p.name for p in tmp_path.iterdir())
    for number, options in enumerate(([], ["--format=pax", "--pax-option=comment=x"], ["--format=gnu"])):
        path = tmp_path / f"repacked{number}.tar"
        subprocess.run(["tar", "cf", path, *options, "-C", tmp_path, *names], check=True)
        assert read_all(path, 4, read_manifest(folder)) == [0, 1, 2, 3]


def test_a_folder_names_what_cannot_be_read(make_shards) -> None:
    folder = make_shards([2, 2, 2])
    (folder / "000001.tar").unlink()
    (folder / "000002.tar").write_bytes(b"no tar")
    samples = ShardFolder(folder)
    assert samples[1]["key"] == "s00001"
    with pytest.raises(SampleError, match=r"sample 1 of .*000001.tar: the shard cannot be read \(No such file"):
        samples[3]
    with pytest.raises(SampleError, match=r"sample 0 of .*000002.tar: the shard cannot be read \(.* is no readable tar"):
        samples[4]
