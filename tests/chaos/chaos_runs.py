"""Training runs in forked ranks of a warm interpreter, to which faults are done; quick enough to do many."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dpt import distributed
from dpt.config.recipe import load_recipe
from dpt.errors import reported
from tests.gloo import load_libraries

PATIENCE_S = 600.0
"""For what must happen sooner or later: machines may be busy."""


class Run:
    """`ranks` processes that train a recipe as launchers make them do, each with its words in FOLDER/rank_N.txt."""

    def __init__(self, ranks: int, recipe: Path, fields: Mapping[str, Any], folder: Path) -> None:
        load_libraries()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, port = folder, distributed.free_port()
        self.processes = [self._start(rank, ranks, port, recipe, fields) for rank in range(ranks)]
        self.codes: dict[int, int] = {}

    def _start(self, rank: int, ranks: int, port: int, recipe: Path, fields: Mapping[str, Any]) -> int:
        sys.stdout.flush()
        if child := os.fork():
            return child
        code: object = 1
        try:
            os.setsid()
            descriptor = os.open(self.folder / f"rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
            sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **sizes, **place}
            torch.set_num_threads(1)
            torch.cuda.is_available = lambda: False
            code = _train(recipe, fields)
        except SystemExit as stop:
            code = stop.code
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 0 if code is None else 1)

    def text(self, rank: int) -> str:
        """What a rank has said."""
        path = self.folder / f"rank_{rank}.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank], number)

    @property
    def ended(self) -> bool:
        """Whether all ranks have."""
        for rank, process in enumerate(self.processes):
            if rank not in self.codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.processes)

    def wait(self) -> list[int]:
        """The ranks' exit codes. AssertionError, and an end to them, if they do not end."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.ended and time.monotonic() < deadline:
            time.sleep(0.02)
        hanging = not self.ended
        self.send(signal.SIGKILL)
        assert not hanging, "\n".join(self.text(rank)[-2000:] for rank in range(len(self.processes)))
        return [self.codes[rank] for rank in range(len(self.processes))]

    def wait_for(self, words: str, rank: int = 0) -> None:
        """Until a rank has said something."""
        deadline = time.monotonic() + PATIENCE_S
        while words not in self.text(rank):
            assert not self.ended, self.text(rank)[-3000:]
            assert time.monotonic() < deadline, f"rank {rank} has not said {words!r}: {self.text(rank)[-1000:]}"
            time.sleep(0.01)


def _train(recipe: Path, fields: Mapping[str, Any]) -> int:
    from dpt.training import loop, records
    from dpt.training.run import run_stage

    records.measure_peak_flops = lambda *_: 1e12  # takes longer than steps here
    loop.Trainer._draw = lambda self: None  # type: ignore[method-assign]
    with reported("pretrain"):
        run_stage(load_recipe(recipe, fields), "pretrain")
    return 0


HOST = socket.gethostname()
