"""Writing a whole synthetic data set, complete or not at all."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.readers import SYNTHESIS as DESCRIPTION
from data_tools.synthesis.generation import SPLITS, VARIETIES, make_scene
from data_tools.synthesis.layouts import TASKS, write_lists, write_scene
from data_tools.synthesis.rendering import render
from data_tools.synthesis.shapes import CLASS_NAMES
from dpt.errors import UserError

GENERATOR_VERSION = 1
"""Incremented whenever the same parameters would give different files."""
_WRITTEN = "written.txt"
"""File with the numbers of the scenes already on disk, while a set is being made."""
_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # each process keeps to one core
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**28),  # glibc keeps freed arrays, saving 1000 page faults per scene, 1/4 of its time
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """Everything that decides the files."""

    scenes: int = 2000
    size: int = 128
    """Width and height, pixels."""
    seed: int = 0
    splits: dict[str, float] = field(default_factory=lambda: {"train": 0.9, "val": 0.1})
    """Share of the scenes in each split."""
    tasks: tuple[str, ...] = tuple(TASKS)
    variety: str = "standard"
    """Name of the ranges that scenes are drawn from."""

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 8:
            raise UserError(f"size is {self.size}; it must be a multiple of 8, at least 16 (latents are 8 times smaller).")
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise UserError(f"tasks {','.join(self.tasks)!r}: choose from {', '.join(TASKS)}.")
        if self.variety not in VARIETIES:
            raise UserError(f"variety {self.variety!r} is unknown; choose one of {', '.join(VARIETIES)}.")
        if not self.splits or not set(self.splits) <= set(SPLITS):
            raise UserError(f"splits {', '.join(self.splits)!r}: choose from {', '.join(SPLITS)}.")
        if min(self.splits.values()) <= 0 or abs(sum(self.splits.values()) - 1) > 1e-6:
            raise UserError(f"splits {self.splits}: shares must be positive and sum to 1.")
        if min(self.counts().values()) < 1:
            raise UserError(f"scenes is {self.scenes}, which leaves a split of {self.splits} empty; ask for more.")

    def counts(self) -> dict[str, int]:
        """Scenes in each split, in the order of SPLITS; the first takes what rounding leaves."""
        names = [name for name in SPLITS if name in self.splits]
        later = {name: round(self.scenes * self.splits[name]) for name in names[1:]}
        return {names[0]: self.scenes - sum(later.values()), **later}

    def description(self) -> dict[str, Any]:
        """Contents of synthesis.json."""
        return {
            "generator_version": GENERATOR_VERSION,
            **asdict(self),
            "tasks": [task for task in TASKS if task in self.tasks],
            "counts": self.counts(),
            "class_names": list(CLASS_NAMES),
        }


def synthesize(out: Path, config: SynthesisConfig, *, workers: int = 2) -> bool:
    """Write a data set to `out`; returns True if it was made, False if it existed already.

    The set appears under its name only once complete; a stopped run resumes where it stopped, if its parameters are the same.

    Raises:
        UserError: `out` holds something else.
    """
    wanted = config.description()
    if out.exists():
        _check_finished(out, wanted)
        print(f"{out}: {config.scenes} scenes, made before, are kept.")
        return False
    partial_out = out.with_name(f".{out.name}.partial")
    written = _written_before(partial_out, wanted)
    if written:
        print(f"{out}: {len(written)} of {config.scenes} scenes are there from a run that was stopped; going on.")
    _write_all(partial_out, config, workers, written)
    (partial_out / _WRITTEN).unlink()
    os.replace(partial_out, out)
    print(f"{out}: {config.scenes} scenes of {config.size} x {config.size} pixels written.")
    return True


def _check_finished(out: Path, wanted: dict[str, Any]) -> None:
    try:
        found = json.loads((out / DESCRIPTION).read_text())
    except (OSError, ValueError):
        raise UserError(f"{out} is no synthetic data set ({DESCRIPTION} is missing); choose another --out.") from None
    if isinstance(found, dict):
        found.setdefault("variety", "standard")  # which sets before version 2 of dpt do not name
    differing = [name for name in wanted if not isinstance(found, dict) or found.get(name) != wanted[name]]
    if differing:
        raise UserError(
            f"{out} holds a synthetic data set with other {', '.join(differing)}; choose another --out or remove the folder."
        )


def _written_before(partial_out: Path, wanted: dict[str, Any]) -> set[int]:
    """The numbers of the scenes that a stopped run of the same parameters has written; the folder is emptied if they differ."""
    try:
        if json.loads((partial_out / DESCRIPTION).read_text()) == json.loads(json.dumps(wanted)):
            *lines, _ = (partial_out / _WRITTEN).read_text().split("\n")  # a line cut off at the end does not count
            numbers = {int(line) for line in lines}
            (partial_out / _WRITTEN).write_text("".join(f"{number}\n" for number in sorted(numbers)))
            return numbers
    except (OSError, ValueError):
        pass
    shutil.rmtree(partial_out, ignore_errors=True)
    partial_out.mkdir(parents=True)
    (partial_out / DESCRIPTION).write_text(json.dumps(wanted, indent=2) + "\n")
    return set()


def _write_all(root: Path, config: SynthesisConfig, workers: int, written: set[int]) -> None:
    counts = config.counts()
    jobs = list(enumerate((split, index) for split, count in counts.items() for index in range(count)))
    left = [job for job in jobs if job[0] not in written]
    write = partial(_write_one, root, config)
    name = root.name.strip(".").removesuffix(".partial")
    with (
        tqdm(total=len(jobs), initial=len(written), desc=f"synthesis -> {name}", unit="scene") as progress,
        (root / _WRITTEN).open("a", buffering=1) as record,
        _several(workers) as map_jobs,
    ):
        for number in map_jobs(write, left):
            record.write(f"{number}\n")
            progress.update()
    write_lists(root, config.tasks, counts)


@contextmanager
def _several(workers: int) -> Iterator[Callable[..., Iterable[int]]]:
    """`map` over `workers` processes, in any order if there are several."""
    if workers <= 1:
        yield map
        return
    with _worker_environment():
        started = multiprocessing.get_context("spawn").Pool(workers)
    with started as pool:
        yield partial(pool.imap_unordered, chunksize=8)


@contextmanager
def _worker_environment() -> Iterator[None]:
    """Set the environment that processes started inside inherit."""
    before = dict(os.environ)
    os.environ |= _WORKER_ENVIRONMENT | before
    try:
        yield
    finally:
        for name in _WORKER_ENVIRONMENT.keys() - before.keys():
            del os.environ[name]


def _write_one(root: Path, config: SynthesisConfig, job: tuple[int, tuple[str, int]]) -> int:
    number, (split, index) = job
    scene = make_scene(config.seed, split, index, VARIETIES[config.variety])
    write_scene(root, config.tasks, split, number, render(scene, config.size))
    return number
