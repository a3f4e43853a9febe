"""Saving and restoring a run's whole state, compared with torch.save, DeepSpeed's own checkpoints, and bare copies.

python -m benchmarks.checkpoint [--preset S/2] [--folder FOLDER] [--json FILE]

`pause`: how long training stands still (`bound`: the same bytes copied once in memory). `on disk`: until everything has
reached the disk (`bound`: the same bytes written and synchronised, and nothing else). `restore`: `bound` reads the files once.
Checkpoints hold weights, two moments and the average in fp32, 16 bytes per parameter; ours are hashed as they are written and
before they are read.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.train_step import model_config, pretraining
from dpt.config.sections import ModelConfig


class Run:
    """A run after one step, and its ways to save to and restore from `folder`."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        from dpt.training.saving import Saver

        training = pretraining(config, 1, "fp32", zero_stage=1)
        training.step()
        self.folder, self.engine = folder, training.engine
        self.saver = Saver(folder / "ours", keep_last=1, keep_every=0)
        self.steps = 0
        self.pauses: dict[str, list[float]] = {}

    # --- saving ---------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        self.steps += 1
        begin = time.perf_counter()
        self.saver.begin(self.engine, self.steps, {"samples_seen": 0})
        self._paused(harness.OURS, begin)
        assert self.saver.finish(), "the checkpoint was not written"

    def torch_save(self) -> None:
        begin = time.perf_counter()
        with (self.folder / "torch.pt").open("wb") as file:
            torch.save(self.state(), file)
            file.flush()
            os.fsync(file.fileno())
        self._paused("torch.save", begin)

    def deepspeed_save(self) -> None:
        begin = time.perf_counter()
        self.engine.deepspeed.save_checkpoint(str(self.folder / "deepspeed"), tag="only")
        os.sync()
        self._paused("deepspeed", begin)

    def _paused(self, name: str, begin: float) -> None:
        self.pauses.setdefault(name, []).append(time.perf_counter() - begin)

    def state(self) -> dict[str, Any]:
        """State that a plain loop saves."""
        return {"model": self.engine.module.state_dict(), "optimizer": self.engine.optimizer.state_dict()}

    # --- restoring ------------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        from dpt.training.checkpoint import newest_checkpoint
        from dpt.training.engine_state import restore

        found = newest_checkpoint(self.folder / "ours")
        assert found is not None
        restore(self.engine, *found)

    def torch_restore(self) -> None:
        state = torch.load(self.folder / "torch.pt", weights_only=True)
        self.engine.module.load_state_dict(state["model"])
        self.engine.optimizer.load_state_dict(state["optimizer"])

    def deepspeed_restore(self) -> None:
        self.engine.deepspeed.load_checkpoint(str(self.folder / "deepspeed"), tag="only")


class Raw:
    """A number of bytes to copy, write through to the disk, and read."""

    def __init__(self, size: int, path: Path) -> None:
        self.path = path
        self._source, self._target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))

    def copy(self) -> None:
        self._target.copy_(self._source)

    def write(self) -> None:
        with self.path.open("wb", buffering=0) as file:
            view = self._source.numpy().data
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())

    def read(self) -> None:
        with self.path.open("rb", buffering=0) as file:
            view = self._target.numpy().data
            while count := file.readinto(view):
                view = view[count:]


def measure(config: ModelConfig, folder: Path, rounds: int) -> list[harness.Row]:
    """Measure all ways of saving in turn, then restoring."""
    run = Run(config, folder)
    run.save()
    size = sum(p.stat().st_size for p in (folder / "ours").rglob("*.safetensors"))
    raw = Raw(size, folder / "raw")
    saving: dict[str, Callable[[], object]] = {
        harness.BOUND: raw.write, harness.OURS: run.save, "torch.save": run.torch_save, "deepspeed": run.deepspeed_save
    }  # fmt: skip
    on_disk = harness.interleave(saving, rounds)
    copies = harness.interleave({harness.BOUND: raw.copy}, rounds)
    pauses = {name: harness.Timing(wall=p[-rounds:], processor=p[-rounds:]) for name, p in run.pauses.items()}
    restoring: dict[str, Callable[[], object]] = {
        harness.BOUND: raw.read, harness.OURS: run.restore, "torch.load": run.torch_restore, "deepspeed": run.deepspeed_restore
    }  # fmt: skip
    restored = harness.interleave(restoring, rounds)
    results = []
    for case, timings in (("pause", copies | pauses), ("on disk", on_disk), ("restore", restored)):
        for row in harness.rows(f"{case} ({size / 1e6:.0f} MB)", timings):
            results.append(row | {"bytes": size, "mb_per_s": size / row["median_s"] / 1e6})
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, preset="S/2")
    parser.add_argument("--depth", type=int, help="blocks (default: the preset's)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args(argv)
    config = model_config(arguments.preset, **({"depth": arguments.depth} if arguments.depth else {}))
    folder = Path(tempfile.mkdtemp(prefix="dpt-checkpoint-", dir=arguments.folder))
    try:
        results = measure(config, folder, arguments.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    harness.finish("checkpoint", results, arguments)


if __name__ == "__main__":
    main()
