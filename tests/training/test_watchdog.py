"""The watchdog names the rank that died, failed or hangs; with real processes, since that is what dies."""

import json
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
from dpt.training import watchdog
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
    dog = Watchdog(60.0, interval_s=2.0)
    time.sleep(0.5)  # the first beat has been sent; the next one would be in one and a half seconds
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


class Server:
    """Rank 0 of two, with what its watchdog has found, and rank 1's token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "broadcast_object", self._keep)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        self.ends: list[tuple[str, int]] = []
        self.dog = Watchdog(60.0, end=lambda reason, code: self.ends.append((reason, code)), interval_s=0.05)

    def _keep(self, where: tuple[str, int, str]) -> tuple[str, int, str]:
        self.host, self.port, self.token = where
        return where

    def connect(self, *messages: bytes) -> socket.socket:
        connection = socket.create_connection((self.host, self.port), timeout=10)
        for message in messages:
            connection.sendall(message)
        return connection

    def admitted(self) -> socket.socket:
        """Rank 1's connection."""
        hello = json.dumps({"token": self.token, "rank": 1, "host": "elsewhere"}).encode()
        connection = self.connect(hello + b"\n")
        assert json.loads(connection.recv(100)) == {"admitted": True}
        return connection

    def wait_for_end(self) -> tuple[str, int]:
        deadline = time.monotonic() + 30
        while not self.ends and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.ends[0]


def closed(connection: socket.socket) -> bool:
    """Whether rank 0 has dropped it."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    "message",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xfe\x00\n",
        b"[]\n",
        b'{"token": 3, "rank": 1, "host": ""}\n',
        b'{"token": "guess", "rank": 1, "host": ""}\n',
        b'{"beat": [9, 1, 5]}\n',
        b'{"reason": "die", "code": 1}\n',
        b'{"left": true}\n',
        b"[" * 60_000 + b"\n",
        b"x" * 100_000,
    ],
)
def test_strangers_are_dropped_and_end_nothing(monkeypatch: pytest.MonkeyPatch, message: bytes) -> None:
    server = Server(monkeypatch)
    stranger = server.connect(message)
    assert closed(stranger)
    rank = server.admitted()  # it still listens
    rank.sendall(b'{"beat": [7, 2, 1]}\n')
    assert not server.ends
    rank.close()
    assert server.wait_for_end() == ("rank 1 (elsewhere) died at step 7 while computing", 1)


def test_floods_and_silent_connections_keep_no_rank_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_STRANGERS", 8)
    monkeypatch.setattr(watchdog, "_HELLO_S", 0.5)
    server = Server(monkeypatch)
    silent = [server.connect() for _ in range(40)]
    rank = server.admitted()
    assert all(map(closed, silent))  # those that were too many, and the others after a while
    rank.sendall(b"no JSON\n" + b'{"beat": "x"}\n' + b'{"beat": [3, 1, 1]}\n')  # what a rank garbles is passed over
    second = server.connect(json.dumps({"token": server.token, "rank": 1, "host": "h"}).encode() + b"\n")
    assert closed(second)  # the rank has its connection
    assert not server.ends
    rank.close()
    assert server.wait_for_end()[0] == "rank 1 (elsewhere) died at step 3 while reading data"


def test_it_listens_where_the_ranks_meet_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch)
    assert server.host == "127.0.0.1"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", server.port), timeout=1)  # of this machine, too
    server.admitted().sendall(b'{"left": true}\n')
    server.dog.close()
    assert not server.ends
