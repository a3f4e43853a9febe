"""Write checkpoints alongside training: state is copied at once, files are written in the background."""

import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dpt import distributed
from dpt.training.averages import spacing
from dpt.training.checkpoint import (
    FORMAT_VERSION,
    checkpoint_name,
    find_checkpoints,
    rank_file,
    remove,
    step_of,
    sync_folder,
    write_state,
    write_tensors,
)
from dpt.training.engine import Engine
from dpt.training.engine_state import engine_state, snapshot
from dpt.training.fragments import parameter_shapes


class Writer(ABC):
    """Writes states of a run to `folder`, complete or invisible: at most one at a time; old ones are removed.

    All methods but `busy` are collective. One that cannot be written is reported, and the run continues.
    """

    noun: str
    """What the states are called in reports."""
    averages_only = False
    """Whether only power-function averages are saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread: threading.Thread | None = None
        self._state: dict[str, Any] = {}
        self._entry: dict[str, Any] = {}
        self._error = ""
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in folder.glob("step_*.tmp"):
                shutil.rmtree(left_over, ignore_errors=True)
        distributed.barrier()

    @property
    def pending(self) -> bool:
        """Whether a write has begun and not been concluded; the same on all ranks."""
        return bool(self._state)

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, engine: Engine, step: int, state: Mapping[str, Any]) -> None:
        """Copy this rank's share and start writing it. `state`: the contents of `state.json` beyond the engine's own."""
        if self._state:
            self.finish()
        optimizer = engine.optimizer
        averages = list(optimizer.ema_lengths) if self.averages_only else None
        tensors, placed = snapshot(engine, averages)
        contents: dict[str, Any] = {"states": averages}
        if averages is None:
            contents = {
                "buffers": [name.removeprefix("buffer/") for name in tensors if name.startswith("buffer/")],
                "states": ["master", *optimizer.state_names()],
                "averages": dict(optimizer.ema_decays),
            }
        self._state = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "parameters": parameter_shapes(engine.module),
            "lengths": dict(optimizer.ema_lengths),
            "engine": engine_state(engine),
            **contents,
            **state,
        }
        self._entry, self._error = {}, ""
        target = self._target
        nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
        needed = int(distributed.all_reduce_sum({"bytes": nbytes})["bytes"])
        self._state["bytes"] = needed
        self._error = distributed.broadcast_object(self._make_folder(target, needed) if distributed.is_main() else "")
        if self._error:
            return
        self._thread = threading.Thread(target=self._write, args=(target, tensors, placed), name="checkpoint")
        self._thread.start()

    @staticmethod
    def _make_folder(target: Path, needed: int) -> str:
        """Make the folder for `needed` bytes; return the reason if that fails."""
        try:
            if shutil.disk_usage(target.parent).free < needed:
                return "the disk is full"
            target.mkdir(exist_ok=True)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    @property
    def _target(self) -> Path:
        return self.folder / (checkpoint_name(self._state["step"]) + ".tmp")

    def _write(self, target: Path, tensors: dict[str, Tensor], placed: dict[str, list[int]]) -> None:
        name = rank_file(distributed.rank())
        try:
            self._entry = {name: {**write_tensors(target / name, tensors), "fragments": placed}}
        except Exception as error:  # whatever failed, the checkpoint must not pass for a complete one
            self._error = f"rank {distributed.rank()}: {getattr(error, 'strerror', None) or repr(error)}"

    def finish(self) -> bool:
        """Wait until all ranks have written, then make the state visible; return False if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        outcomes = distributed.gather_objects((self._entry, self._error))
        errors = [error for _, error in outcomes if error]
        step, needed = self._state["step"], self._state["bytes"]
        if distributed.is_main():
            try:
                if not errors:
                    self._state["files"] = {name: entry for entries, _ in outcomes for name, entry in entries.items()}
                    self._commit()
            except OSError as error:
                errors = [error.strerror or str(error)]
            if errors:
                shutil.rmtree(self._target, ignore_errors=True)
                self._report(step, needed, errors[0])
        self._state = {}
        return not distributed.broadcast_object(bool(errors))

    def _commit(self) -> None:
        """Write the state, rename the folder, then remove what is no longer kept, and damaged ones of this step or later."""
        target = self._target
        write_state(target, self._state)
        final = target.with_suffix("")
        if final.exists():
            remove(final)
        os.rename(target, final)
        sync_folder(self.folder)
        self._forget_after(self._state["step"])
        for old in find_checkpoints(self.folder):
            if not self._is_kept(old):
                remove(old)

    @abstractmethod
    def _is_kept(self, old: Path) -> bool:
        """Whether an older complete state is still kept now that the newest one exists."""

    def forget_after(self, step: int) -> None:
        """Remove those of later steps, after a rewind to another course."""
        if distributed.is_main():
            self._forget_after(step)
        distributed.barrier()

    def _forget_after(self, step: int) -> None:
        for old in find_checkpoints(self.folder):
            if step_of(old) > step:
                remove(old)

    def _report(self, step: int, needed: int, reason: str) -> None:
        place = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(place).free
        newest = next(iter(find_checkpoints(self.folder)), None)
        kept = f"the newest is still {newest.name}" if newest else "there is none yet"
        print(
            f"The {self.noun} of step {step} was not written: {reason}. It needs {needed / 1e9:.3f} GB in {self.folder}, where "
            f"{free / 1e9:.3f} GB are free; make room. Training continues; {kept}.",
            flush=True,
        )


class SnapshotWriter(Writer):
    """Writes snapshots of the power-function averages: at most `most`, initially `every` steps apart (`averages.spacing`)."""

    noun = "snapshot of averages"
    averages_only = True

    def __init__(self, folder: Path, *, every: int, most: int) -> None:
        super().__init__(folder)
        self.every, self.most = every, most

    def is_due(self, step: int) -> bool:
        """Whether a snapshot is due after `step` optimizer steps."""
        return self._is_on_grid(step, step)

    def _is_on_grid(self, step: int, now: int) -> bool:
        return step % spacing(now, self.every, self.most) == 0

    def _is_kept(self, old: Path) -> bool:
        return self._is_on_grid(step_of(old), self._state["step"])


class Saver(Writer):
    """Writes checkpoints of a run to `folder`, and snapshots of its averages, if enabled.

    A snapshot is on disk before any checkpoint begun after it: a run that resumes from there will not take it
    again.
    """

    noun = "checkpoint"

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int, snapshots: SnapshotWriter | None = None) -> None:
        super().__init__(folder)
        self.keep_last, self.keep_every, self.snapshots = keep_last, keep_every, snapshots

    @property
    def pending(self) -> bool:
        return super().pending or (self.snapshots is not None and self.snapshots.pending)

    @property
    def busy(self) -> bool:
        return super().busy or (self.snapshots is not None and self.snapshots.busy)

    def take_snapshot(self, engine: Engine, step: int) -> None:
        """Start writing a snapshot if one is due after `step` steps and the weights have been updated."""
        if self.snapshots is not None and engine.optimizer.updates and self.snapshots.is_due(step):
            self.snapshots.begin(engine, step, {})

    def finish(self) -> bool:
        if self.snapshots is not None and self.snapshots.pending:
            self.snapshots.finish()
        return not super().pending or super().finish()

    def forget_after(self, step: int) -> None:
        super().forget_after(step)
        if self.snapshots is not None:
            self.snapshots.forget_after(step)

    def _is_kept(self, old: Path) -> bool:
        newest = find_checkpoints(self.folder)[: self.keep_last]
        return old in newest or bool(self.keep_every and step_of(old) % self.keep_every == 0)
