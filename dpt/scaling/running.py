"""Run the launches of studies on this machine: one at a time, or several side by side, each on its share."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpt.distributed import free_port
from dpt.errors import UserError
from dpt.scaling.launching import check_needs, command, count_devices, identity, pending, record
from dpt.scaling.processes import LaunchProcess, start_forked, start_fresh
from dpt.scaling.side_by_side import Running, run_side_by_side
from dpt.scaling.study import Launch, Study


def run_here(studies: Sequence[Study], *, jobs: int = 1, fork: bool = False, say: Callable[[str], None]) -> None:
    """Run what is pending, `jobs` launches at a time, each on an equal share of this machine's devices or CPU threads.

    `fork`: launches on the CPU are forked from one process that has loaded the libraries, which saves each of them ten seconds.

    A launch waits for the one that provides its weights; one that several studies share runs once. Each logs to `log.txt`
    in its folder. An interrupted one continues from its last checkpoint. UserError if one fails: no further one
    starts then, and those still running finish first.
    """
    pending_jobs = _join(studies)
    total, begun, seconds = len(pending_jobs), 0, list[float]()
    start_process = start_forked if fork and count_devices() == 0 else start_fresh
    shares = _shares(jobs)

    def start(job: _Job, slot: int, beside: int) -> LaunchProcess:
        nonlocal begun
        begun += 1
        launch, share = job.launch, shares[slot]
        record(job.study, launch)
        words = share.command(launch)
        say(f"[{begun}/{total}] {launch.name}\n  $ {shlex.join(words)}")
        launch.folder.mkdir(parents=True, exist_ok=True)
        return start_process(words, launch.folder / "log.txt", share.environment())

    def ended(one: Running[_Job]) -> str:
        launch = one.job.launch
        if not one.succeeded:
            return f"{launch.name} ended with exit code {one.process.exit_code()}; {launch.folder / 'log.txt'} says why."
        seconds.append(one.seconds)
        rest = sum(seconds) / len(seconds) * (total - len(seconds)) / jobs
        left = f"; {len(seconds)} of {total} done, about {rest / 60:.0f} min left" if rest else ""
        say(f"  {launch.name}: done in {seconds[-1]:.0f} s{left}")
        return ""

    if failures := run_side_by_side(pending_jobs, slots=jobs, start=start, ended=ended):
        raise UserError(f"{' '.join(failures)} Call again to go on.")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A launch that is pending."""

    study: Study
    launch: Launch

    @property
    def result(self) -> Path:
        return self.launch.result

    @property
    def needs(self) -> list[Path]:
        return [self.launch.folder.parent / self.launch.parent / "weights/config.json"] if self.launch.parent else []


def _join(studies: Sequence[Study]) -> list[_Job]:
    """The pending launches of all studies, each folder once; UserError if two studies want different ones in one folder."""
    check_needs(studies)
    first: dict[Path, _Job] = {}
    for study in studies:
        for launch in pending(study):
            same = first.setdefault(launch.folder, _Job(study=study, launch=launch))
            if identity(same.launch) != identity(launch):
                files = f"{study.path} and {same.study.path}"
                raise UserError(f"{files} ask for different launches in {launch.folder}; change the output of one.")
    return list(first.values())


@dataclass(frozen=True, kw_only=True)
class _Share:
    """The part of this machine that one of several concurrent launches uses."""

    port: int
    """Port where the ranks of its launches meet; no other launch or study on this machine uses it."""
    devices: list[str] | None = None
    """CUDA devices; None: all, or there are none."""
    threads: int | None = None
    """CPU threads of each process; None: as the launcher chooses."""

    def command(self, launch: Launch) -> list[str]:
        return command(launch, num_devices=None if self.devices is None else len(self.devices), port=self.port)

    def environment(self) -> dict[str, str]:
        variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        if self.threads is not None:
            variables.setdefault("OMP_NUM_THREADS", str(self.threads))
        if self.devices is not None:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        return variables


def _shares(jobs: int) -> list[_Share]:
    """Split this machine into equal parts; UserError if it has fewer devices than that."""
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: it must be at least 1.")
    ports = set[int]()
    while len(ports) < jobs:
        ports.add(free_port())
    if jobs == 1:
        return [_Share(port=ports.pop())]
    count = count_devices()
    if 0 < count < jobs:
        raise UserError(f"--jobs {jobs}: this machine has {count} devices, and every launch needs one of its own.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = visible if len(visible) == count else [str(number) for number in range(count)]
    each = count // jobs
    threads = max(1, (os.cpu_count() or 1) // jobs // max(1, each))
    return [
        _Share(port=port, devices=devices[n * each : (n + 1) * each] if each else None, threads=threads)
        for n, port in enumerate(ports)
    ]
