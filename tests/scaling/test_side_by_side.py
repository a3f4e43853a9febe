"""Jobs side by side: what ends the whole ends its processes."""

import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpt.scaling.processes import LaunchProcess, start_fresh
from dpt.scaling.side_by_side import run_side_by_side


@dataclass(frozen=True)
class _Job:
    result: Path
    needs: tuple[Path, ...] = ()


def test_sigterm_ends_the_processes_too(tmp_path: Path) -> None:
    started: list[LaunchProcess] = []

    def start(job: _Job, slot: int, beside: int) -> LaunchProcess:
        started.append(
            start_fresh([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log.txt", dict(os.environ))
        )
        if len(started) == 2:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[-1]

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run_side_by_side([_Job(tmp_path / "a"), _Job(tmp_path / "b")], slots=2, start=start, ended=lambda one: "")
    assert stop.value.code == 128 + signal.SIGTERM
    assert [process.exit_code() for process in started] == [-signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_while_a_process_is_being_started_ends_that_one_too(tmp_path: Path) -> None:
    started: list[LaunchProcess] = []

    def start(job: _Job, slot: int, beside: int) -> LaunchProcess:
        started.append(
            start_fresh([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log.txt", dict(os.environ))
        )
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    try:
        with pytest.raises(SystemExit):
            run_side_by_side([_Job(tmp_path / "a")], slots=1, start=start, ended=lambda one: "")
        assert started[0].exit_code() == -signal.SIGTERM
    finally:
        started[0].terminate()
