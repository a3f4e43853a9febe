"""Sources: folders, patterns and URLs."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dpt.data.shards import ShardFolder
from dpt.data.stream import LatentStream
from dpt.errors import UserError
from dpt.urls import Patience
from tests.data.streams import labels, stream


def test_patterns_and_folders_are_the_same(folder: Path) -> None:
    assert labels(stream(folder), 6) == labels(stream(f"{folder}/{{000000..000002}}.tar"), 6)
    assert sorted(labels(stream(f"{folder}/{{000000..000001}}.tar"), 4)) == list(range(20))


def test_sources_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shard 000003.tar is not in the manifest, which ends at 000002.tar"):
        stream(f"{folder}/{{000000..000003}}.tar")
    with pytest.raises(UserError, match="no such shard folder"):
        stream(tmp_path / "none" / "{0..3}.tar")
    with pytest.raises(UserError, match="brace pattern"):
        stream(f"pipe:cat {folder}/x")
    with pytest.raises(UserError, match=r"no manifest can be fetched from pipe:cat .*/none/manifest.json"):
        stream("pipe:cat /none/{000000..000001}.tar")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_pipes(folder: Path, tmp_path: Path, workers: int, cached: bool) -> None:
    options = {"num_workers": workers, "cache_dir": str(tmp_path / "cache") if cached else ""}
    piped = stream(f"pipe:cat {folder}/{{000000..000002}}.tar", **options)
    assert labels(piped, 12) == labels(stream(folder), 12)
    if cached:
        assert len(list((tmp_path / "cache").iterdir())) == 3
        for path in folder.glob("*.tar"):
            path.unlink()
        assert len(labels(stream(f"pipe:cat {folder}/{{000000..000002}}.tar", **options), 6)) == 30


def test_a_pipe_that_fails_at_first(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "flaky"
    script.write_text('#!/bin/sh\nif [ -e "$1.tried" ]; then cat "$1"; else touch "$1.tried"; head -c 2000 "$1"; exit 1; fi\n')
    script.chmod(0o755)
    assert sorted(labels(stream(f"pipe:{script} {folder}/{{000000..000002}}.tar"), 6)) == list(range(30))


def test_a_pipe_that_cuts_off(folder: Path) -> None:
    source = f"pipe:head -c 3000 {folder}/{{000000..000002}}.tar"
    shutil.copy(folder / "manifest.json", folder / "whole.json")
    with pytest.raises(UserError, match=r"the shard cannot be read \(3000 of \d+ bytes came\)"):
        labels(stream(source), 2)


def test_a_pipe_that_stalls(folder: Path) -> None:
    with pytest.raises(UserError, match=r"nothing came for 0.5 s"):
        stream(f"pipe:cat {folder}/{{000000..000002}}.tar; exec sleep 20", patience=Patience(retries=0, stall_s=0.5))


def test_a_slow_pipe_is_waited_for(folder: Path) -> None:
    slow = f"pipe:for n in 1 2 3; do sleep 0.1; done; cat {folder}/{{000000..000002}}.tar"
    assert sorted(labels(stream(slow, patience=Patience(retries=0, stall_s=5.0)), 6)) == list(range(30))


def test_http(folder: Path, served) -> None:
    base = served(folder)
    assert labels(stream(base), 6) == labels(stream(folder), 6)
    assert sorted(labels(stream(base + "/{000000..000001}.tar"), 4)) == list(range(20))


def test_s3_folders(make_shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards([10] * 3)
    command = tmp_path / "aws"
    command.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && exec cat "{folder}/${{3#s3://bucket/my set/}}"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert labels(stream("s3://bucket/my set"), 4) == labels(stream(folder), 4)
    assert labels(stream("s3://bucket/my set/{000000..000001}.tar"), 3) == labels(stream(f"{folder}/{{000000..000001}}.tar"), 3)
    assert ShardFolder("s3://bucket/my set")[12]["key"] == "s00012"


def test_remote_folders_are_read_in_order_and_kept(make_shards, served, tmp_path: Path) -> None:
    folder, cache = make_shards([3, 2]), tmp_path / "cache"
    remote = ShardFolder(served(folder), cache_dir=str(cache))
    assert [sample["key"] for sample in map(remote.__getitem__, range(5))] == [f"s{i:05d}" for i in range(5)]
    remote.close()
    assert sorted(path.name[17:] for path in cache.iterdir()) == ["000000.tar", "000001.tar"]


def conditioned(side: int):
    """What makes samples with latents of so many rows and columns."""
    return lambda number: {"cond_latents": np.full((2, 2, 4, side, side), number, np.float16)}


def test_mixtures_that_do_not_fit(make_shards) -> None:
    sets = [make_shards([2], conditioned(side), task="flow", resolution=size) for side, size in ((2, 32), (2, 64), (3, 32))]
    for other, words in ((1, "the resolution is 64 px"), (2, "cond_latents is float16")):
        with pytest.raises(UserError, match=words):
            LatentStream([str(sets[0]), str(sets[other])], global_batch_size=2)
