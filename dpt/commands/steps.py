"""Run commands that read each other's results side by side; finished ones are skipped, changed ones are repeated."""

import hashlib
import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpt.data.manifest import write_atomically
from dpt.distributed import free_port
from dpt.errors import UserError
from dpt.scaling.processes import LaunchProcess, start_forked, start_fresh
from dpt.scaling.side_by_side import Running, run_side_by_side


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command, its title, the file that proves it finished, and the folder that holds everything it makes."""

    title: str
    command: list[str]
    result: Path
    folder: Path
    needs: tuple[Path, ...] = ()
    """Results of earlier steps that it reads."""


def run_steps(steps: list[Step], out: Path, jobs: int) -> None:
    """Run the unfinished steps, `jobs` at a time, each on its share of the CPU threads; their output is kept in `out`/logs.

    A step waits for those whose results it reads. It is repeated if its command, its recipe or its inputs have changed.
    UserError if a step fails: no further step starts, and those already running finish first.
    """
    record = out / "commands.json"
    begun: dict[str, list[str]] = json.loads(record.read_text()) if record.exists() else {}
    numbers, done_again = {step.title: number for number, step in enumerate(steps, 1)}, set[Path]()

    def start(step: Step, slot: int, beside: int) -> LaunchProcess | None:
        head, identity = f"[{numbers[step.title]}/{len(steps)}] {step.title}", _identity(step)
        same = begun.get(step.title) == identity and not done_again.intersection(step.needs)
        if same and step.result.exists():
            print(f"{head}: done before", flush=True)
            return None
        if not same:
            _remove(step.folder, out)
        begun[step.title] = identity
        write_atomically(record, json.dumps(begun, indent=1))
        print(f"\n{head}\n  $ {shlex.join(_shown(step.command))}", flush=True)
        return _start_shown(step, numbers[step.title], out / "logs", beside)

    def ended(one: Running[Step]) -> str:
        number = numbers[one.job.title]
        done_again.add(one.job.result)
        if not one.succeeded:
            return f"step {number} ({one.job.title}) ended with exit code {one.process.exit_code()}"
        print(f"[{number}/{len(steps)}] done in {one.seconds:.0f} s", flush=True)
        return ""

    if failures := run_side_by_side(steps, slots=jobs, start=start, ended=ended):
        raise UserError(f"{' and '.join(failures)}; fix what it says above and run again.")


def _start_shown(step: Step, number: int, logs: Path, beside: int) -> LaunchProcess:
    """Start a step's process; each check of its exit code first prints its new output, lines prefixed by the step's number.

    `beside`: number of steps that share the CPU threads.
    """
    logs.mkdir(exist_ok=True)
    log, shown = logs / f"{number:02}.txt", 0
    log.unlink(missing_ok=True)
    forked = step.command[0] == sys.executable and not torch.cuda.is_available()
    start = start_forked if forked else start_fresh
    process = start(_on_free_port(step.command), log, _environment(beside))

    def exit_code() -> int | None:
        nonlocal shown
        code = process.exit_code()
        if not log.exists():
            return code
        with log.open("rb") as file:
            file.seek(shown)
            lines = file.read()
        end = max(lines.rfind(b"\n"), lines.rfind(b"\r")) + 1
        shown += end
        for line in lines[:end].decode("utf-8", "replace").splitlines():
            if line.strip():
                print(f"  {number} | {line}", flush=True)
        return code

    return replace(process, exit_code=exit_code)


def _identity(step: Step) -> list[str]:
    """The command and hashes of the recipes that it names."""
    recipes = [Path(word) for word in step.command if word.startswith("ds_configs/")]
    return [*step.command, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in recipes)]


def _shown(command: list[str]) -> list[str]:
    return ["python", *command[1:]] if command[0] == sys.executable else command


def _on_free_port(command: list[str]) -> list[str]:
    """Give the command a free port for its ranks (DeepSpeed's launcher always takes 29500)."""
    if command[0] != "deepspeed":
        return command
    return [command[0], "--master_port", str(free_port()), *command[1:]]


def _environment(beside: int) -> dict[str, str]:
    """This environment, with the interpreter's folder (and so its `deepspeed`) first and a share of the CPU threads."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    without_gpu = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}  # otherwise DeepSpeed's launcher looks for one
    threads = {} if beside == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // beside))}
    return {**without_gpu, **threads, **os.environ, "PATH": path}


def _remove(folder: Path, out: Path) -> None:
    """Remove a stale result, never anything outside `out`."""
    assert out.resolve() in folder.resolve().parents
    if folder.is_dir():
        shutil.rmtree(folder)
