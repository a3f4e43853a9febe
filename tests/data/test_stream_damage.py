"""What goes wrong with shards: named, counted, bounded, retried; never silent, never a hang."""

import hashlib
import os
import tarfile
from itertools import islice
from pathlib import Path

import pytest

from dpt.data import stream as stream_module
from dpt.data.manifest import MemberSpec
from dpt.data.reader import ShardReader
from dpt.errors import UserError
from tests.data.streams import labels, stream


def truncate(path: Path, samples: float, of: int = 10) -> None:
    size = path.stat().st_size
    os.truncate(path, int((size - 1024) * samples / of))


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_tar_stops_the_run_by_default(folder: Path, workers: int) -> None:
    truncate(folder / "000001.tar", 7.5)
    with pytest.raises(UserError, match=r"sample [789] of .*000001.tar: the tar is truncated; unreadable samples: 1") as caught:
        labels(stream(folder, num_workers=workers), 6)
    assert "dpt.data.max_bad_samples" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_tar_is_bridged_if_allowed(folder: Path, caplog: pytest.LogCaptureFixture, workers: int) -> None:
    truncate(folder / "000001.tar", 7.5)
    found = stream(folder, max_bad_samples=3, num_workers=workers)
    seen = labels(found, 12)  # two epochs: the same three samples are bad again
    assert sorted(set(seen)) == [number for number in range(30) if number not in (17, 18, 19)]
    assert len(seen) == 60
    assert len(found.bad_samples) == 3
    assert all("000001.tar: the tar is truncated" in text for text in found.bad_samples)
    assert caplog.text.count("another sample takes its place") == 3
    with pytest.raises(UserError, match="unreadable samples: 3, dpt"):
        labels(stream(folder, max_bad_samples=2, num_workers=workers), 12)


@pytest.mark.parametrize("row", [0, 4, 9])
def test_corrupt_sample(folder: Path, row: int) -> None:
    path = folder / "000002.tar"
    stride = (path.stat().st_size - 1024) // 10
    with path.open("r+b") as file:
        file.seek(row * stride + 512)
        file.write(b"\xff" * 64)  # the label's npy header
    found = stream(folder, max_bad_samples=1)
    assert 20 + row not in labels(found, 6)
    assert found.bad_samples[0].startswith(f"sample {row} of {path}: ")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_bit_is_named_and_never_handed_out(folder: Path, workers: int) -> None:
    path = folder / "000001.tar"
    content = bytearray(path.read_bytes())
    content[content.rindex(b"latents.npy") + 512 + 128 + 100] ^= 1  # in a sample's latents, behind the headers
    path.write_bytes(content)
    assert labels(stream(folder, num_workers=workers), 6)  # which nothing but the hash tells
    with pytest.raises(UserError, match=r"000001\.tar: the shard cannot be read \(its contents are not what was written, by"):
        labels(stream(folder, num_workers=workers, verify=True), 6)
    found = stream(folder, num_workers=workers, verify=True, max_bad_samples=10)
    assert set(labels(found, 12)).isdisjoint(range(10, 20))


def test_a_shard_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (hashed.append(Path(file.name).name), digest(file, name))[1])
    monkeypatch.setattr(stream_module, "_OPENED_AHEAD", 5)
    labels(stream(folder, verify=True), 24)  # four epochs
    assert sorted(hashed) == ["000000.tar", "000001.tar", "000002.tar"]


def test_missing_shard(folder: Path) -> None:
    (folder / "000000.tar").unlink()
    with pytest.raises(UserError, match=r"000000.tar: the shard cannot be read \(No such file"):
        labels(stream(folder), 6)
    found = stream(folder, max_bad_samples=10)
    assert set(labels(found, 12)) == set(range(10, 30))
    assert len(found.bad_samples) == 10


def test_shard_that_vanishes_on_the_way(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_OPENED_AHEAD", 5)
    folder = make_shards([5] * 8)
    found = stream(folder, global_batch_size=1, prefetch=1, max_bad_samples=35)
    batches = iter(found)
    next(batches)
    for path in folder.glob("*.tar"):
        if path.name != "000004.tar":
            path.unlink()
    seen = [int(next(batches)["label"]) for _ in range(80)]
    assert set(seen[40:]) == set(range(20, 25))  # what was open could be read to its end, later epochs have one shard
    assert len(found.bad_samples) == 35
    with pytest.raises(UserError, match="max_bad_samples: 5"):
        labels(stream(folder, max_bad_samples=5), 20)


def test_shard_cut_off_while_open(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_OPENED_AHEAD", 5)
    folder = make_shards([200, 200])
    found = stream(folder, prefetch=1)
    batches = iter(found)
    next(batches)
    for path in folder.glob("*.tar"):
        truncate(path, 0)
    with pytest.raises(UserError, match="truncated"):
        list(islice(batches, 30))


def test_nothing_readable_is_an_error_not_a_hang(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        path.write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"no sample can be read|is no readable tar"):
        labels(stream(folder, max_bad_samples=10**6), 2)


def test_read_errors_are_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([True, False, True, False, False])
    original = ShardReader.read

    def rows(self, *arguments):
        if next(failures, False):
            raise OSError(5, "Input/output error")
        return original(self, *arguments)

    monkeypatch.setattr(ShardReader, "read", rows)
    found = stream(folder)
    assert sorted(labels(found, 6)) == list(range(30))
    assert found.bad_samples == []


def test_lasting_read_errors_name_the_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, least = ShardReader.read, 2

    def read(self, first: int, count: int, *arguments):
        if count >= least:
            raise OSError(5, "Input/output error")
        return original(self, first, count, *arguments)

    monkeypatch.setattr(ShardReader, "read", read)
    assert sorted(labels(stream(folder), 6)) == list(range(30))  # read one by one
    least = 1
    with pytest.raises(UserError, match=r"sample \d+ of .*tar: Input/output error"):
        labels(stream(folder), 6)


def test_shards_of_other_programs_are_read(make_shards, tmp_path: Path) -> None:
    folder = make_shards([6])
    path = folder / "000000.tar"
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path, filter="data")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in sorted(tmp_path.iterdir()):
            tar.add(member, member.name, filter=lambda info: info.replace(mtime=1.5 if "3" in info.name else 1, deep=False))
    assert sorted(labels(stream(folder, global_batch_size=3), 2)) == list(range(6))


def test_a_member_other_than_promised(make_shards) -> None:
    members = {"label": MemberSpec(dtype="int64", shape=()), "latents": MemberSpec(dtype="float16", shape=(2, 4, 8, 8))}
    with pytest.raises(UserError, match=r"its latents is float16 \[2, 4, 4, 4\], not as in the manifest"):
        labels(stream(make_shards([6], members=members)), 2)


def test_a_worker_that_fails_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self, *arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(ShardReader, "read", fail)
    with pytest.raises(UserError, match=r"samples 0 to 9 of .*00000\d.tar: .* failed \(MemoryError: no room\)"):
        labels(stream(folder, num_workers=2), 2)
