"""Run jobs that read each other's results, several side by side on this machine."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from dpt.scaling.processes import LaunchProcess

_POLL_S = 0.2


class Job(Protocol):
    """A unit of work that runs as one process."""

    @property
    def result(self) -> Path:
        """The file that proves that it has finished."""

    @property
    def needs(self) -> Collection[Path]:
        """Results of other jobs that it reads."""


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, kw_only=True)
class Running(Generic[J]):
    """A job and its process."""

    job: J
    slot: int
    """0 to the number of slots - 1, unique among running jobs."""
    process: LaunchProcess
    begun: float

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.begun

    @property
    def succeeded(self) -> bool:
        """Whether the ended process exited with 0 and left its result."""
        return self.process.exit_code() == 0 and self.job.result.exists()


def run_side_by_side(
    jobs: Sequence[J], *, slots: int, start: Callable[[J, int, int], LaunchProcess | None], ended: Callable[[Running[J]], str]
) -> list[str]:
    """Run the jobs, `slots` at a time, each as soon as those whose results it needs have ended. Returns the failures.

    `start(job, slot, beside)` starts one that shares the machine with at most `beside` - 1 others; None: nothing to do.
    `ended(running)` takes each ended one, and returns its failure in words, or "". After a failure no further job starts,
    and those still running finish first. Interrupted or terminated, it ends the processes.
    """
    waiting, running, failures, free = list(jobs), list[Running[J]](), list[str](), list(range(slots))
    with _ending(running) as asked:
        while running or (waiting and not failures):
            if asked.is_set():
                raise SystemExit(128 + signal.SIGTERM)
            unmade = {job.result for job in waiting} | {one.job.result for one in running}
            ready = [job for job in waiting if not unmade.intersection(job.needs)]
            beside = min(slots, len(ready) + len(running))
            for job in ready:
                if failures or not free:
                    break
                waiting.remove(job)
                process = start(job, free[0], beside)
                if process is not None:
                    running.append(Running(job=job, slot=free.pop(0), process=process, begun=time.monotonic()))
            time.sleep(_POLL_S)
            for one in [one for one in running if one.process.exit_code() is not None]:
                running.remove(one)
                free.append(one.slot)
                if failure := ended(one):
                    failures.append(failure)
    return failures


@contextlib.contextmanager
def _ending(running: list[Running[J]]) -> Iterator[threading.Event]:
    """End the processes of `running` however the body ends. Yields the event that SIGTERM sets: if it ended the body at once, a
    process just being started would be in no list."""
    asked = threading.Event()
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set()) if in_main_thread else None
    try:
        yield asked
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
