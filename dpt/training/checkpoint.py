"""Checkpoint files: every rank's fragments of weights, moments and averages, under layout-independent names.

`CHECKPOINTS/step_00000100/` holds one safetensors file per rank and `state.json`. It is written as `step_00000100.tmp`
and renamed when everything is on the disk: it is complete or invisible. Nothing in it is a pickle. A run of any number of
ranks, expert-parallel degree, ZeRO stage and precision reads the byte ranges that it needs.
"""

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dpt import distributed
from dpt.errors import UserError

FORMAT_VERSION = 1
STATE_NAME = "state.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class DamagedCheckpoint(UserError):
    """A checkpoint that differs from what was written; the text names the file."""


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def rank_file(rank: int) -> str:
    """A rank's file within a checkpoint."""
    return f"rank_{rank:05d}.safetensors"


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, newest first."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name) and (p / STATE_NAME).is_file()]
    return sorted(found, key=step_of, reverse=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write CPU tensors as safetensors, flushed to disk; return the file's "bytes" and "sha256".

    One pass, without a second copy in memory; the interpreter is free while it hashes and writes.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        head = memoryview(len(text).to_bytes(8, "little") + text)
        for view in (head, *(_bytes(tensor) for tensor in tensors.values())):
            digest.update(view)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + offset, "sha256": digest.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state.json` with its own hash, flushed to disk."""
    content = {"sha256": _state_hash(state), **state}
    with (folder / STATE_NAME).open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a machine crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _state_hash(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read `state.json`. DamagedCheckpoint if it differs from what was written, UserError for another version."""
    path = checkpoint / STATE_NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        written = state.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error})") from error
    if _state_hash(state) != written:
        raise DamagedCheckpoint(f"{path} is damaged (its content does not match its hash)")
    if state["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version is {state['format_version']}, {FORMAT_VERSION} is read here; use that version."
        )
    return state


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Raise DamagedCheckpoint unless the file has the size and hash recorded in the state."""
    try:
        if path.stat().st_size != entry["bytes"]:
            raise DamagedCheckpoint(f"{path} is damaged ({path.stat().st_size} bytes instead of {entry['bytes']})")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from error
    if digest != entry["sha256"]:
        raise DamagedCheckpoint(f"{path} is damaged (its content does not match its hash)")


def kept_averages(state: Mapping[str, Any]) -> dict[float, str]:
    """The averages in a checkpoint: decay -> name of the optimizer state."""
    if "averages" in state:
        return {decay: name for name, decay in state["averages"].items()}
    decays = state["recipe"]["dpt"]["training"]["ema_decays"]  # written before checkpoints named them
    return {decay: f"ema{number}" for number, decay in enumerate(decays) if decay > 0}


def kept_lengths(state: Mapping[str, Any]) -> dict[float, str]:
    """The power-function averages in a checkpoint or snapshot: relative length -> name of the optimizer state."""
    return {length: name for name, length in state.get("lengths", {}).items()}


class CheckpointReader:
    """Reads any range of any parameter's states, whichever ranks wrote it."""

    def __init__(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        self._places: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for file, entry in state["files"].items():
            for name, (offset, numel) in entry["fragments"].items():
                self._places[name].append((offset, numel, file))
        self._open: dict[str, Any] = {}

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.checkpoint / name, framework="pt")
        return self._open[name]

    def read_into(self, target: Tensor, state: str, name: str, offset: int) -> None:
        """Fill `target` [n] with elements offset : offset + n of the flattened parameter's `state`."""
        filled = 0
        for start, numel, file in self._places[name]:
            low, high = max(start, offset), min(start + numel, offset + target.numel())
            if low < high:
                part = self._file(file).get_slice(f"{state}/{name}")[low - start : high - start]
                target[low - offset : high - offset].copy_(part)
                filled += high - low
        if filled != target.numel():
            raise DamagedCheckpoint(f"{self.checkpoint} holds {filled} of {target.numel()} numbers of {state}/{name}")

    def whole(self, state: str, name: str, shape: list[int]) -> Tensor:
        """A whole parameter's `state`, float32."""
        result = torch.empty(torch.Size(shape).numel())
        self.read_into(result, state, name, 0)
        return result.view(shape)

    def buffer(self, name: str) -> Tensor:
        """A buffer."""
        return self._file(rank_file(0)).get_tensor(f"buffer/{name}")


def verify(checkpoint: Path) -> dict[str, Any]:
    """Hash a checkpoint's files (each on one rank) and return its state. Collective; ranks raise DamagedCheckpoint together."""
    state: dict[str, Any] = {}
    problem = ""
    try:
        state = read_state(checkpoint)
        files = list(state["files"].items())
        for name, entry in files[distributed.rank() :: distributed.world_size()]:
            check_file(checkpoint / name, entry)
    except DamagedCheckpoint as error:
        problem = str(error)
    problems = [text for text in distributed.gather_objects(problem) if text]
    if problems:
        raise DamagedCheckpoint(problems[0])
    return state


def newest_checkpoint(
    folder: Path, *, wanted: Callable[[Mapping[str, Any]], bool] = lambda state: True
) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint whose state is `wanted`, and its state; None if there is none. Collective.

    Damaged ones are skipped and named. UserError if there are checkpoints but all are damaged.
    """
    found = distributed.broadcast_object([p.name for p in find_checkpoints(folder)])
    damage: list[str] = []
    for name in found:
        try:
            state = verify(folder / name)
        except DamagedCheckpoint as error:
            damage.append(str(error))
            continue
        if wanted(state):
            if damage:
                distributed.log(f"{'; '.join(damage)}; falling back to {folder / name}, the newest checkpoint that is whole.")
            return folder / name, state
    if damage and len(damage) == len(found):
        raise UserError(f"{folder}: no checkpoint is whole ({'; '.join(damage)}); remove the folder to start over.")
    return None


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a kill halfway leaves nothing that looks like one."""
    (checkpoint / STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
