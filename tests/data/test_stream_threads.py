"""Reading takes threads of the training process and nothing else, each rank its own share, and fetches ahead."""

import gc
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import pytest
import torch

from dpt import urls
from dpt.data import shards, stream
from dpt.data.order import permutation
from dpt.data.stream import LatentStream
from dpt.errors import UserError
from tests.data.streams import HASTY, take


def data_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("data ")]


def keys(source: str, count: int, **options) -> list[str]:
    return [key for batch in take(source, count, **{"global_batch_size": 8, **options}) for key in batch["key"]]


def test_threads_only_and_page_locked_memory_in_this_process(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked process cannot use the parent's CUDA context: page-locked memory asked for there kills it."""
    folder = str(make_shards([10] * 8))
    expected = keys(folder, 10)

    def refuse(*arguments, **options):
        raise AssertionError("a process is started")

    for module, name in ((os, "fork"), (os, "posix_spawn"), (subprocess, "Popen")):
        monkeypatch.setattr(module, name, refuse)
    owners, empty = [], torch.empty

    def allocate(*shape, pin_memory: bool = False, **options):
        owners.append((os.getpid(), pin_memory))
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", allocate)
    assert keys(folder, 10, num_workers=4, pin_memory=True) == expected
    assert set(owners) == {(os.getpid(), True)}


@pytest.mark.parametrize("workers", [0, 4])
def test_closing_ends_the_threads(make_shards, workers: int) -> None:
    found = iter(LatentStream([str(make_shards([10] * 8))], global_batch_size=8, num_workers=workers))
    next(found)
    assert len(data_threads()) == 1 + max(1, workers) + workers  # fill, open, read
    found.close()
    assert data_threads() == []


def test_closing_gives_up_a_fetch_that_hangs(make_shards, tmp_path: Path) -> None:
    folder, script = make_shards([10] * 2), tmp_path / "hanging"
    script.write_text('#!/bin/sh\ncase "$1" in *1.tar) exec sleep 600;; *) exec cat "$1";; esac\n')
    script.chmod(0o755)
    seed = next(seed for seed in range(9) if permutation(2, seed, 0, 0, 0)[0] == 0)  # the shard that comes is the first
    options = {"global_batch_size": 1, "num_workers": 2, "prefetch": 1, "patience": HASTY, "seed": seed}
    found = iter(LatentStream([f"pipe:{script} {folder}/{{000000..000001}}.tar"], **options))
    next(found)
    found.close()
    assert data_threads() == []


def test_a_process_ends_in_the_middle_of_reading(make_shards) -> None:
    code = (
        "import sys; from dpt.data.stream import LatentStream\n"
        "batches = iter(LatentStream(sys.argv[1:], global_batch_size=8, num_workers=2)); next(batches)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(make_shards([50] * 4))], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("weights", [[], [3, 1]])
def test_a_rank_opens_its_own_share_of_every_set(make_shards, monkeypatch: pytest.MonkeyPatch, weights: list[float]) -> None:
    opened: set[tuple[str, int]] = set()
    original = shards.open_shard

    def open_shard(source, number, *arguments, **options):
        opened.add((source.name, number))
        return original(source, number, *arguments, **options)

    monkeypatch.setattr(shards, "open_shard", open_shard)
    names = [str(make_shards([8] * 32)), str(make_shards([8] * 32))]
    options = {"global_batch_size": 8, "weights": weights}
    whole: list[list[str]] = [batch["key"] for batch in islice(LatentStream(names, **options), 64)]
    shares = []
    for rank in range(4):
        opened.clear()
        mine = LatentStream(names, rank=rank, world_size=4, prefetch=1, **options)
        monkeypatch.setattr(stream, "_OPENED_AHEAD", 1)
        assert [batch["key"] for batch in islice(mine, 32)] == [batch[rank::4] for batch in whole[:32]]
        shares.append([sum(name == own for own, _ in opened) for name in names])
    assert all(count <= 32 / 4 + 2 * 2 for share in shares for count in share)  # two lanes, which may begin amid a shard


def _first_batch(source: str, hard: int, found: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        found.write_text(f"{len(keys(source, 1, global_batch_size=64))} samples")
    except UserError as error:
        found.write_text(str(error))


@pytest.mark.parametrize(("hard", "expected"), [(64, "more than 48 shards must be open at once"), (1024, "64 samples")])
def test_open_files_are_bounded(make_shards, tmp_path: Path, hard: int, expected: str) -> None:
    """64 lanes of shards behind URLs: the soft limit is raised, and if that is not enough the run says what to do."""
    source, found = f"pipe:cat {make_shards([2] * 80)}/{{000000..000079}}.tar", tmp_path / "found"
    gc.collect()  # streams of earlier tests hold files until then, which a fork would hold too
    process = multiprocessing.get_context("fork").Process(target=_first_batch, args=(source, hard, found))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert expected in found.read_text()


def test_fetching_goes_on_past_the_first_shards(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """All shards that a lane's next stretch needs are on their way before the first batch is there."""
    folder, asked = make_shards([4] * 40), []
    original = urls.fetch

    def fetching(url: str, file, patience) -> None:
        asked.append(url)
        original(url, file, patience)

    monkeypatch.setattr(urls, "fetch", fetching)
    reader = LatentStream([f"pipe:cat {folder}/{{000000..000039}}.tar"], global_batch_size=64, num_workers=2, patience=HASTY)
    found = iter(reader)
    next(found)
    found.close()
    assert len(set(asked)) > 17
