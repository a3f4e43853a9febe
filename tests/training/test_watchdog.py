"""The watchdog names the rank that died, failed or hangs; with real processes, since that is what dies."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from dpt import distributed
from dpt.training.watchdog import Watchdog, _find_hang, _Rank

HOST = socket.gethostname()


def _rank(rank: int, world_size: int, folder: Path, timeout_s: float, what: str) -> None:
    """A rank that takes a step every 20 ms; rank 1 has the trouble."""
    sys.stderr = (folder / f"said-{rank}").open("w")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    if rank == 1 and what == "late":
        connect = socket.create_connection
        socket.create_connection = lambda *args, **options: (time.sleep(0.5), connect(*args, **options))[1]
    dog = Watchdog(timeout_s, interval_s=0.1)
    distributed.barrier()
    (folder / f"ready-{rank}").touch()
    for step in range(1000):
        if rank == 1 and step == 5 and what == "hang":
            time.sleep(60)
        if rank == 1 and step == 5 and what == "fail":
            dog.fail("the disk is gone", 2)
            os._exit(2)
        if step == 8 and rank == 1 and what == "leave late":
            time.sleep(1.0)  # ten intervals
        if step == 8 and what.startswith("leave"):
            dog.close()
            os._exit(0)
        if rank == 1 or step < 6 or what != "hang":  # the others would wait in a collective
            dog.beat(step, "computing")
        time.sleep(0.02)


def _start(folder: Path, timeout_s: float, what: str, world_size: int = 3) -> list[BaseProcess]:
    context = multiprocessing.get_context("fork")
    ranks: list[BaseProcess] = [
        context.Process(target=_rank, args=(rank, world_size, folder, timeout_s, what)) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 60
    while len(list(folder.glob("ready-*"))) < world_size:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return ranks


def _join(ranks: list[BaseProcess]) -> list[int | None]:
    for process in ranks:
        process.join(30)
    return [process.exitcode for process in ranks]


@pytest.mark.parametrize(
    ("what", "codes", "words"),
    [
        ("hang", [1, 1, 1], f"rank 1 ({HOST}) made no progress for 1 s at step 4 while computing; all ranks stop."),
        ("fail", [2, 2, 2], f"rank 1 ({HOST}) failed at step 4 while computing: the disk is gone; all ranks stop."),
        ("leave", [0, 0, 0], ""),
        ("leave late", [0, 0, 0], ""),
    ],
)
def test_hangs_failures_and_peace(tmp_path: Path, what: str, codes: list[int], words: str) -> None:
    found = _join(_start(tmp_path, 1.0, what))
    assert ((tmp_path / "said-0").read_text().strip(), found) == (words, codes)


@pytest.mark.parametrize(("victim", "what"), [(0, "run"), (1, "run"), (1, "late")])
def test_a_killed_rank_is_named_at_once(tmp_path: Path, victim: int, what: str) -> None:
    """Also one that is slow to connect, and dies as soon as it can."""
    ranks = _start(tmp_path, 60.0, what)
    begin = time.monotonic()
    os.kill(ranks[victim].pid or 0, signal.SIGKILL)
    codes = _join(ranks)
    assert time.monotonic() - begin < 10
    assert [code for rank, code in enumerate(codes) if rank != victim] == [1, 1]
    said = (tmp_path / f"said-{0 if victim else 1}").read_text()
    assert said.startswith(f"rank {victim} (")
    assert "died" in said


def test_a_failure_is_told_with_where_it_happened(tmp_path: Path) -> None:
    """Even within the interval at whose beginning the rank last said where it was."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_fail_at_once, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    assert _join(ranks) == [2, 2]
    said = f"rank 1 ({HOST}) failed at step 9 while saving: the disk is gone; all ranks stop."
    assert (tmp_path / "said-0").read_text().strip() == said


def _fail_at_once(rank: int, folder: Path) -> None:
    sys.stderr = (folder / f"said-{rank}").open("w")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    dog = Watchdog(60.0, interval_s=5.0)
    time.sleep(1)  # the first beat has been sent; the next one would be in four seconds
    dog.beat(9, "saving")
    if rank == 1:
        dog.fail("the disk is gone", 2)
        os._exit(2)
    time.sleep(60)


def test_only_the_ranks_behind_count() -> None:
    now = time.monotonic()
    waiting = [_Rank(number=n, host="h", step=7, phase=3, changed=now - 100) for n in (0, 2)]
    slow = _Rank(number=1, host="h", step=7, phase=1, changed=now - 5)
    assert _find_hang([waiting[0], slow, waiting[1]], 10) == {}
    slow.changed = now - 11
    verdict = _find_hang([waiting[0], slow, waiting[1]], 10)
    assert verdict["reason"] == "rank 1 (h) made no progress for 10 s at step 7 while reading data"


def test_one_rank_alone() -> None:
    ends: list[tuple[str, int]] = []
    dog = Watchdog(0.3, end=lambda reason, code: ends.append((reason, code)), interval_s=0.05)
    dog.beat(3, "reading data")
    deadline = time.monotonic() + 5
    while not ends and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ends == [(f"rank 0 ({HOST}) made no progress for 0.3 s at step 3 while reading data", 1)]
