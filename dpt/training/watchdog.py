"""A watchdog that names the rank that died or hangs, and stops the others.

It uses no collectives, which a hung rank would block: every rank keeps a socket open to rank 0 and reports its progress. A
closed socket is a death, seen at once; ranks that stay behind the others for too long hang.

Rank 0 listens only on the address at which the ranks meet. It accepts only connections that begin with the run's token
and drops all others.
"""

import asyncio
import contextlib
import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dpt import distributed

_HELLO_S = 10.0
"""Seconds within which a connection must send the token."""
_STRANGERS = 256
"""Maximum connections at a time that have not sent it yet; more where there are many ranks."""
_GREETINGS = 10
_LONGEST_LINE = 1 << 16
_GARBLED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""Exceptions raised by a line that is not a message."""

PHASES = ("starting", "reading data", "computing", "updating weights", "recording", "validating", "saving")
"""A rank's possible phases, in the order of a step."""


@dataclass
class _Rank:
    """Rank 0's knowledge of a rank."""

    number: int
    host: str = "?"
    step: int = 0
    phase: int = 0
    beats: int = 0
    changed: float = field(default_factory=time.monotonic)
    """Time of its last progress, on this process's clock."""
    left: bool = False

    def update(self, step: int, phase: int, beats: int) -> None:
        if beats != self.beats:
            self.changed = time.monotonic()
        self.step, self.phase, self.beats = step, phase, beats

    def __str__(self) -> str:
        return f"rank {self.number} ({self.host})"

    @property
    def where(self) -> str:
        return f"at step {self.step} while {PHASES[self.phase]}"


class Watchdog:
    """Ends this process, with the reason on stderr of rank 0, when some rank dies, fails, or makes no progress for `timeout_s`.

    `end`: ends the process (given the reason and the exit code) instead of `os._exit`, as the main thread may hang
    in a collective forever. Creating it is collective.
    """

    def __init__(self, timeout_s: float, *, end: Callable[[str, int], None] | None = None, interval_s: float = 1.0) -> None:
        self.timeout_s, self.interval_s = timeout_s, interval_s
        self._end = end or _print_and_exit
        self._own = _Rank(number=distributed.rank(), host=socket.gethostname())
        self._world_size = distributed.world_size()
        self._closing, self._greeted = threading.Event(), threading.Event()
        self._failure: dict[str, Any] = {}
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        server = _open_server(address) if self._own.number == 0 else None
        where = (address, server.getsockname()[1] if server else 0, secrets.token_hex(16))
        host, port, self._token = distributed.broadcast_object(where)
        target, arguments = (self._serve, (server,)) if server else (self._report, (host, port))
        self._thread = threading.Thread(target=target, args=arguments, name="watchdog", daemon=True)
        self._thread.start()
        if server is None:
            self._greeted.wait()  # rank 0 would never miss a rank that dies before it has said who it is

    def beat(self, step: int, phase: str) -> None:
        """Report that this rank is at `step` and begins `phase` (one of PHASES), or continues it."""
        self._own.update(step, PHASES.index(phase), self._own.beats + 1)

    def fail(self, reason: str, exit_code: int) -> None:
        """Tell the others why this rank is about to end with an error."""
        self._failure = {"reason": reason, "code": exit_code}
        self._thread.join(timeout=5 + 5 * self.interval_s)

    def close(self) -> None:
        """Shut down without a verdict; all ranks do so."""
        self._closing.set()
        self._thread.join(timeout=5 * self.interval_s)

    # --- ranks other than 0: tell, and listen for the verdict ---

    def _report(self, host: str, port: int) -> None:
        try:
            with self._greet(host, port) as connection:
                self._greeted.set()
                while not (self._closing.is_set() or self._failure):
                    self._tell_place(connection)
                    with contextlib.suppress(TimeoutError):
                        verdict = _receive(connection)
                        if verdict.get("left"):  # rank 0 has done its part, and this rank is a little late
                            return None
                        reason = verdict.get("reason", f"rank 0 ({host}) died")
                        return self._stop(reason, verdict.get("code", 1))
                self._tell_place(connection)  # may have changed since the last interval began
                _send(connection, self._failure or {"left": True})
        except (OSError, ValueError):
            self._stop(f"rank 0 ({host}) died or is out of reach", 1)
        finally:
            self._greeted.set()
        return None

    def _greet(self, host: str, port: int) -> socket.socket:
        """Open a connection that rank 0 admits; retried if dropped, as in a flood of strangers. OSError if that fails."""
        for _ in range(_GREETINGS):
            connection = socket.create_connection((host, port), timeout=60)
            with contextlib.suppress(OSError, ValueError):
                _send(connection, {"token": self._token, "rank": self._own.number, "host": self._own.host})
                if _receive(connection).get("admitted"):
                    connection.settimeout(self.interval_s)
                    return connection
            connection.close()
            time.sleep(self.interval_s)
        raise ConnectionError("rank 0 does not answer")

    def _tell_place(self, connection: socket.socket) -> None:
        _send(connection, {"beat": [self._own.step, self._own.phase, self._own.beats]})

    def _stop(self, reason: str, exit_code: int) -> None:
        if not (self._closing.is_set() or self._failure):
            self._end(reason, exit_code)

    # --- rank 0: listen, and decide ---

    def _serve(self, listening: socket.socket) -> None:
        verdict = asyncio.run(self._watch(listening))
        if verdict:
            self._stop(verdict["reason"], verdict["code"])

    async def _watch(self, listening: socket.socket) -> dict[str, Any]:
        """Return {"reason", "code"} once a rank has failed, died, or hangs; {} once all have left."""
        ranks = [self._own, *(_Rank(number=number) for number in range(1, self._world_size))]
        peers = _Peers(self._token, ranks)
        server = await asyncio.start_server(peers.meet, sock=listening, limit=_LONGEST_LINE)
        verdict: dict[str, Any] = {}
        deadline = float("inf")
        while not verdict and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(peers.news.wait(), self.interval_s)
            peers.news.clear()
            verdict = peers.verdict or _find_hang(ranks, self.timeout_s) or self._failure
            if self._closing.is_set():
                deadline = min(deadline, time.monotonic() + 3 * self.interval_s)
                if all(rank.left for rank in ranks[1:]):
                    break
        server.close()
        peers.tell({"left": True} if self._closing.is_set() else verdict)
        return verdict


class _Peers:
    """Rank 0's connections to the others, and to strangers until they are dropped."""

    def __init__(self, token: str, ranks: list[_Rank]) -> None:
        self.verdict: dict[str, Any] = {}
        """{"reason", "code"} of the first rank that failed or died."""
        self.news = asyncio.Event()
        """Set when a rank has left, or there is a verdict."""
        self._token, self._ranks = token, ranks
        self._writers: dict[int, asyncio.StreamWriter] = {}
        """Connections to the ranks that have sent the token."""
        self._strangers: list[Any] = []
        """Tasks of connections that have not sent it, in order of arrival."""

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection until it ends or is dropped."""
        if len(self._strangers) >= max(_STRANGERS, 2 * len(self._ranks)):
            self._strangers.pop(0).cancel()  # the one that has been silent longest
        task = asyncio.current_task()
        self._strangers.append(task)
        rank = None
        try:
            async with asyncio.timeout(_HELLO_S):
                rank = self._admit(json.loads(await reader.readline()), writer)
            self._strangers.remove(task)
            if rank is not None:
                await self._follow(rank, reader)
        except (OSError, *_GARBLED):
            pass
        finally:
            if task in self._strangers:
                self._strangers.remove(task)
            writer.close()
        if rank is not None and not (rank.left or self.verdict):
            self.verdict = {"reason": f"{rank} died {rank.where}", "code": 1}
            self.news.set()

    def _admit(self, hello: Any, writer: asyncio.StreamWriter) -> _Rank | None:
        """The rank of this connection, if it sent the token and that rank has no connection yet."""
        known = isinstance(hello["token"], str) and hmac.compare_digest(hello["token"].encode(), self._token.encode())
        number = int(hello["rank"])
        if not known or not 0 < number < len(self._ranks) or number in self._writers:
            return None
        self._writers[number] = writer
        self._ranks[number].host = str(hello["host"])
        writer.write(_line({"admitted": True}))
        return self._ranks[number]

    async def _follow(self, rank: _Rank, reader: asyncio.StreamReader) -> None:
        """Process a rank's messages. ValueError for a line that is too long."""
        while line := await reader.readline():
            with contextlib.suppress(*_GARBLED):
                message = json.loads(line)
                if "beat" in message:
                    step, phase, beats = map(int, message["beat"])
                    rank.update(step, phase % len(PHASES), beats)
                elif "reason" in message:
                    reason = f"{rank} failed {rank.where}: {message['reason']}"
                    self.verdict = self.verdict or {"reason": reason, "code": int(message["code"])}
                    self.news.set()
                else:
                    rank.left = bool(message["left"])
                    self.news.set()

    def tell(self, verdict: dict[str, Any]) -> None:
        """Send all ranks the verdict, or that rank 0 left."""
        for writer in self._writers.values():
            writer.write(_line(verdict))
            writer.close()


def _open_server(address: str) -> socket.socket:
    """Open a server on a free port of the address where the ranks meet; if that is not ours, on all addresses, and say so."""
    places: list[Any] = []
    with contextlib.suppress(OSError):
        places = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    for family, _, _, _, place in places:
        with contextlib.suppress(OSError):
            server = socket.create_server((place[0], 0), family=family)
            server.setblocking(False)
            return server
    distributed.log(f"The watchdog listens on all addresses: {address} (MASTER_ADDR) is none of this machine's own.")
    server = socket.create_server(("", 0))
    server.setblocking(False)
    return server


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Receive a line from rank 0; {} if the connection has ended. TimeoutError if nothing arrives."""
    text = b""
    while not text.endswith(b"\n"):
        data = connection.recv(65536)
        if not data:
            return {}
        text += data
    return dict(json.loads(text))


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(_line(message))


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _find_hang(ranks: list[_Rank], timeout_s: float) -> dict[str, Any]:
    """Return {"reason", "code"} if the ranks furthest behind make no progress; the others only wait for them."""
    present = [rank for rank in ranks if not rank.left]
    last = min((rank.step, rank.phase) for rank in present)
    behind = [rank for rank in present if (rank.step, rank.phase) == last]
    if any(time.monotonic() - rank.changed < timeout_s for rank in behind):
        return {}
    names = ", ".join(map(str, behind))
    return {"reason": f"{names} made no progress for {timeout_s:g} s {behind[0].where}", "code": 1}


def _print_and_exit(reason: str, exit_code: int) -> None:
    if distributed.is_main() or reason.startswith("rank 0 "):
        print(f"{reason}; all ranks stop.", file=sys.stderr, flush=True)
    os._exit(exit_code)
