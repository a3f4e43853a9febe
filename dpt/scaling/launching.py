"""A study's pending launches as commands or dependent SLURM jobs (`running` runs them on this machine)."""

import functools
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from dpt.data.manifest import write_atomically
from dpt.errors import UserError
from dpt.locking import taking_turns
from dpt.scaling.shard_sets import how_to_make
from dpt.scaling.study import Launch, Study
from dpt.tracking.store import sqlite_path

_RECORD = "launches.json"
_JOBS = "jobs.json"


def command(launch: Launch, *, num_devices: int | None = None, port: int | None = None) -> list[str]:
    """The command of a launch on `num_devices` devices (None: all of this machine).

    With one device, DeepSpeed's launcher would only add an interpreter. `port`: where ranks meet, if not the default.
    """
    if (count_devices() if num_devices is None else num_devices) <= 1:
        words = ["python"]
    else:
        words = ["deepspeed", *(["--master_port", str(port)] if port else [])]
    return [*words, f"launchers/{launch.launcher}.py", *launch.arguments()]


@functools.cache
def count_devices() -> int:
    """CUDA devices that this process may use."""
    import torch

    return torch.cuda.device_count()


def pending(study: Study) -> list[Launch]:
    """The launches without a result, in order; UserError if a recipe is wrong or a folder holds another command's output."""
    made = _read_record(study)
    for launch in study.launches:
        _ = launch.resolved
        if launch.folder.exists() and launch.name in made and made[launch.name] != identity(launch):
            raise UserError(
                f"{launch.folder} was made by another command than {study.path} now asks for; remove it, or change output."
            )
    return [launch for launch in study.launches if not launch.result.exists()]


def missing(study: Study) -> list[str]:
    """Files and folders that the study needs but that are missing."""
    return [needed for needed in study.needs if not Path(needed).exists()]


def check_needs(studies: Sequence[Study]) -> None:
    """Raise UserError if anything that the studies need is missing, with the command that makes each."""
    absent = list(dict.fromkeys(needed for study in studies for needed in missing(study)))
    if absent:
        files = ", ".join(dict.fromkeys(str(study.path) for study in studies if missing(study)))
        raise UserError(f"{files}: {len(absent)} things must be made first:\n" + "\n".join(how_to_make(n) for n in absent))


def identity(launch: Launch) -> list[str]:
    """Identity of a launch: its command, except for where its run is recorded."""
    fields = {name: value for name, value in launch.fields.items() if not name.startswith("tracking.")}
    return [launch.launcher, launch.recipe, json.dumps(fields, sort_keys=True)]


def _read_record(study: Study) -> dict[str, list[str]]:
    path = study.output / _RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(study: Study, launch: Launch) -> None:
    study.output.mkdir(parents=True, exist_ok=True)
    path = study.output / _RECORD
    with taking_turns(path.with_suffix(".lock")):  # studies that run side by side may share the folder
        write_atomically(path, json.dumps({**_read_record(study), launch.name: identity(launch)}, indent=1))


def submit(studies: Sequence[Study], options: Sequence[str], *, script: str, say: Callable[[str], None]) -> None:
    """Submit to SLURM what is pending and not yet queued; a launch waits for the one that provides its weights.

    UserError, before anything is submitted, for a store that jobs on several nodes cannot share; and if sbatch refuses.
    """
    for study in studies:
        _check_store(study)
    check_needs(studies)
    for study, launches in [(study, pending(study)) for study in studies]:
        _submit(study, launches, [*options, script], say)


def _check_store(study: Study) -> None:
    """Raise UserError if a launch records in SQLite: its locks do not hold across nodes, so jobs spoil each other's records."""
    for tracking in (launch.resolved.dpt.tracking for launch in study.launches):
        if tracking.enabled and sqlite_path(tracking.uri) is not None:
            raise UserError(
                f'{study.path}: its jobs cannot share "{tracking.uri}", for SQLite cannot be written from several nodes; run '
                "`mlflow server --host 0.0.0.0 --allowed-hosts NODE:5000` on a NODE that all of them reach, and give its "
                "address: --uri http://NODE:5000."
            )


def _submit(study: Study, launches: Sequence[Launch], how: Sequence[str], say: Callable[[str], None]) -> None:
    """Submit one study's launches. `how`: sbatch options and the script."""
    path = study.output / _JOBS
    jobs: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for launch in launches:
        if launch.name in jobs and _is_queued(jobs[launch.name]):
            say(f"{launch.name}: job {jobs[launch.name]} is still there")
            continue
        record(study, launch)
        launch.folder.mkdir(parents=True, exist_ok=True)
        waits = launch.parent in jobs and _is_queued(jobs[launch.parent])
        after = [f"--dependency=afterok:{jobs[launch.parent]}"] if waits else []
        where = [f"--job-name={launch.name}", f"--output={launch.folder}/slurm-%j.log"]
        words = ["sbatch", "--parsable", *where, *after, *how, launch.launcher, *launch.arguments()[1:]]
        try:
            answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"sbatch failed for {launch.name} ({getattr(error, 'stderr', '') or error}).") from error
        jobs[launch.name] = answer.strip().split(";")[0]
        write_atomically(path, json.dumps(jobs, indent=1))
        say(f"{launch.name}: job {jobs[launch.name]}")


def _is_queued(job: str) -> bool:
    """Whether SLURM still holds a job, waiting or running."""
    try:
        return bool(subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout.strip())
    except OSError:
        return False
