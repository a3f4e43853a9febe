"""Writing shards: safe keys, plain arrays, complete or not at all (`tests/data/test_reader.py` reads them)."""

import fcntl
import io
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.encoding.shards import ShardWriter, npy_bytes, shard_key
from dpt.errors import UserError

DTYPES = ("float16", "float32", "int64", "uint8")


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=120), st.text(max_size=120))
def test_keys_are_safe_and_distinct(one: str, other: str) -> None:
    for key in (shard_key(one), shard_key(other)):
        assert 0 < len(key) <= 72
        assert "." not in key
        assert not key.startswith("/")
        assert f"{key}.latents_mirrored.npy".isascii()
    assert (shard_key(one) == shard_key(other)) == (one == other)


def test_plain_keys_stay() -> None:
    assert shard_key("ai_001_001/cam-00_fr0000") == "ai_001_001/cam-00_fr0000"
    assert shard_key("../../etc/passwd").startswith("_/_/etc/passwd-")


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4), st.integers(0, 2**32 - 1))
def test_arrays_are_npy_files(dtype: str, shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    buffer = io.BytesIO()
    np.save(buffer, array)
    assert npy_bytes(array) == buffer.getvalue()


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), ShardWriter(tmp_path / "0.tar") as writer:
        writer.add("a", {"unknown": np.zeros(3, np.uint8)}, {})
    assert list(tmp_path.iterdir()) == []


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "0.tar"), pytest.raises(UserError, match="another process is writing this shard"):
        ShardWriter(tmp_path / "0.tar")


def test_a_shard_that_is_finished_meanwhile_is_not_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lock = tmp_path / "000000.tar", fcntl.flock
    (tmp_path / ".000000.tar.part").write_bytes(b"whole")

    def lock_late(*arguments: int) -> None:
        (tmp_path / ".000000.tar.part").replace(path)
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with pytest.raises(UserError, match="another process is writing this shard"):
        ShardWriter(path)
    assert path.read_bytes() == b"whole"


def test_a_killed_writer_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from data_tools.encoding.shards import ShardWriter\n"
        "w = ShardWriter(pathlib.Path(sys.argv[1])); "
        "w._file.write(b'x' * 9999); w._file.flush(); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "0.tar"
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".0.tar.part"]
    with ShardWriter(path) as writer:
        writer.add("a", {"label": np.array(3, np.int64)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["0.tar"]
    with tarfile.open(path) as tar:
        assert tar.getnames()[0] == "a.label.npy"
