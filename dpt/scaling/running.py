"""Runs the launches of studies on this machine: one at a time, or several side by side, each on its share."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpt.errors import UserError
from dpt.scaling.launching import check_needs, command, count_devices, identity, pending, record
from dpt.scaling.processes import LaunchProcess, start_forked, start_fresh
from dpt.scaling.study import Launch, Study

_FIRST_PORT = 29600
_POLL_S = 0.2


def run_here(studies: Sequence[Study], *, jobs: int = 1, fork: bool = False, say: Callable[[str], None]) -> None:
    """Run what is pending, `jobs` launches at a time, each on an equal share of this machine's devices or CPU threads.

    `fork`: launches on the CPU come from one process that has loaded the libraries, which saves each of them ten seconds.

    A launch waits for the one that gives its weights; what several studies ask for runs once. The output of a launch goes to
    `log.txt` in its folder. An interrupted one continues from its last checkpoint. UserError if one fails: no further one
    starts then, and those that run beside it end first.
    """
    waiting = _join(studies)
    total, seconds = len(waiting), list[float]()
    start = start_forked if fork and count_devices() == 0 else start_fresh
    free, running, failures = _shares(jobs), list[_Running](), list[str]()
    try:
        while running or (waiting and not failures):
            unfinished = {launch.folder for _, launch in waiting} | {one.launch.folder for one in running}
            ready = [pair for pair in waiting if pair[1].folder.parent / pair[1].parent not in unfinished]
            for study, launch in ready[: 0 if failures else len(free)]:
                waiting.remove((study, launch))
                record(study, launch)
                running.append(_Running.start(launch, free.pop(0), start))
                say(f"[{total - len(waiting)}/{total}] {launch.name}\n  $ {shlex.join(running[-1].words)}")
            time.sleep(_POLL_S)
            for one in [one for one in running if one.process.exit_code() is not None]:
                running.remove(one)
                free.append(one.share)
                if one.failure:
                    failures.append(one.failure)
                    continue
                seconds.append(time.monotonic() - one.begun)
                rest = sum(seconds) / len(seconds) * (total - len(seconds)) / jobs
                left = f"; {len(seconds)} of {total} done, about {rest / 60:.0f} min left" if rest else ""
                say(f"  {one.launch.name}: done in {seconds[-1]:.0f} s{left}")
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
    if failures:
        raise UserError(f"{' '.join(failures)} Call again to go on.")


def _join(studies: Sequence[Study]) -> list[tuple[Study, Launch]]:
    """The pending launches of all studies, each folder once; UserError if two studies want different ones in a folder."""
    check_needs(studies)
    first: dict[Path, tuple[Study, Launch]] = {}
    for study in studies:
        for launch in pending(study):
            other, same = first.setdefault(launch.folder, (study, launch))
            if identity(same) != identity(launch):
                raise UserError(
                    f"{study.path} and {other.path} ask for different launches in {launch.folder}; change the output of one."
                )
    return list(first.values())


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What one of the launches that run side by side has of this machine."""

    number: int
    devices: list[str] | None = None
    """CUDA devices; None: all, or there are none."""
    threads: int | None = None
    """CPU threads of each process; None: as the launcher chooses."""

    def command(self, launch: Launch) -> list[str]:
        if self.devices is None:
            return command(launch)
        return command(launch, num_devices=len(self.devices), port=_FIRST_PORT + self.number)

    def environment(self) -> dict[str, str]:
        variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        if self.threads is not None:
            variables.setdefault("OMP_NUM_THREADS", str(self.threads))
        if self.devices is not None:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        return variables


def _shares(jobs: int) -> list[_Share]:
    """This machine in equal parts; UserError if it has fewer devices than that."""
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: it must be at least 1.")
    if jobs == 1:
        return [_Share(number=0)]
    count = count_devices()
    if 0 < count < jobs:
        raise UserError(f"--jobs {jobs}: this machine has {count} devices, and every launch needs one of its own.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = visible if len(visible) == count else [str(number) for number in range(count)]
    each = count // jobs
    threads = max(1, (os.cpu_count() or 1) // jobs // max(1, each))
    return [
        _Share(number=n, devices=devices[n * each : (n + 1) * each] if each else None, threads=threads) for n in range(jobs)
    ]


@dataclass(frozen=True, kw_only=True)
class _Running:
    launch: Launch
    share: _Share
    words: list[str]
    process: LaunchProcess
    begun: float

    @classmethod
    def start(
        cls, launch: Launch, share: _Share, start: Callable[[list[str], Path, dict[str, str]], LaunchProcess]
    ) -> "_Running":
        words = share.command(launch)
        launch.folder.mkdir(parents=True, exist_ok=True)
        process = start(words, launch.folder / "log.txt", share.environment())
        return cls(launch=launch, share=share, words=words, process=process, begun=time.monotonic())

    @property
    def failure(self) -> str:
        """What to say of an ended process; empty if it succeeded."""
        if self.process.exit_code() == 0 and self.launch.result.exists():
            return ""
        return f"{self.launch.name} ended with exit code {self.process.exit_code()}; {self.launch.folder / 'log.txt'} says why."
