"""Records that a job keeps beside its shards until all exist: one per shard, and the settings that all must share."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dpt.data.manifest import MANIFEST_NAME, MemberSpec, ShardRecord, read_manifest, write_atomically
from dpt.errors import UserError

_FOLDER = ".records"


@dataclass(kw_only=True)
class Description:
    """Contents of one or more shards: members with their shapes, sums over latents, inputs without a sample."""

    members: dict[str, MemberSpec] = field(default_factory=dict)
    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Count, sum and sum of squares of the posterior means of each member of latents, by channel: `[3, C]`."""
    unread: list[dict[str, Any]] = field(default_factory=list)

    def add(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Add the arrays of one sample."""
        for name, array in arrays.items():
            self._add_member(name, MemberSpec(dtype=array.dtype.name, shape=array.shape))
            if "latents" in name:
                means = array[..., 0, :, :, :].astype(np.float64)  # of [..., 2, C, h, w]
                flat = np.moveaxis(means, -3, 0).reshape(means.shape[-3], -1)
                part = np.stack([np.full(len(flat), float(flat.shape[1])), flat.sum(1), np.square(flat).sum(1)])
                self._add_sums(name, part)

    def merge(self, other: "Description") -> None:
        """Add another shard's."""
        for name, spec in other.members.items():
            self._add_member(name, spec)
        for name, sums in other.sums.items():
            self._add_sums(name, sums)
        self.unread += other.unread

    def _add_member(self, name: str, spec: MemberSpec) -> None:
        known = self.members.setdefault(name, spec)
        if known != spec:
            assert (known.dtype, len(known.shape)) == (spec.dtype, len(spec.shape)), f"{name} is both {known} and {spec}"
            shape = tuple(a if a == b else -1 for a, b in zip(known.shape, spec.shape, strict=True))
            self.members[name] = MemberSpec(dtype=spec.dtype, shape=shape)

    def _add_sums(self, name: str, part: NDArray[np.float64]) -> None:
        self.sums[name] = self.sums[name] + part if name in self.sums else part

    @property
    def num_unreadable(self) -> int:
        """Inputs that could not be read; those left out on purpose do not count."""
        return sum(not item["excluded"] for item in self.unread)

    def statistics(self) -> dict[str, dict[str, list[float]]]:
        """Mean and standard deviation of the posterior means of each member of latents, by channel."""
        found = {}
        for name, (count, total, squares) in self.sums.items():
            mean = total / count
            found[name] = {"mean": mean.tolist(), "std": np.sqrt(np.maximum(squares / count - mean**2, 0)).tolist()}
        return found


class Records:
    """The records of an unfinished set in `out`."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / _FOLDER
        self._settings = self.folder / "settings.json"
        self._held: IO[str] | None = None
        """The settings file, under a lock shared with concurrent jobs."""

    @property
    def finished(self) -> bool:
        """Whether the set has its manifest. Ask after finding records missing: they are removed once it exists."""
        return (self.out / MANIFEST_NAME).exists()

    def claim(self, settings: dict[str, Any]) -> bool:
        """Make the folder for shards of these settings, or join the jobs that have. Returns whether all shards exist already.

        UserError if it holds shards of other settings, or something else.
        """
        wanted = json.loads(json.dumps(settings))
        # In this order: other jobs make the settings before anything else, and remove them once the manifest exists.
        begun = self._settings.exists()
        other = self.out.exists() and (not self.out.is_dir() or any(p.name != _FOLDER for p in self.out.iterdir()))
        if self.finished:
            self._compare(dict(read_manifest(self.out).encoding), wanted)
            return True
        if other and not begun and not self._settings.exists():
            raise UserError(f"{self.out} holds files that do not belong to an unfinished set of shards; choose another --out.")
        while not self._join():
            self._begin(json.dumps(wanted, indent=1))
        assert self._held is not None
        self._compare(json.load(self._held), wanted)
        return False

    def _begin(self, text: str) -> None:
        """Make the settings, unless another job is first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = self.folder / f".{uuid.uuid4().hex}.part"
        with contextlib.suppress(FileNotFoundError):  # a job that made nothing removed the folder
            mine.write_text(text, encoding="utf-8")
            try:
                os.link(mine, self._settings)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                mine.replace(self._settings)
            mine.unlink(missing_ok=True)

    def _join(self) -> bool:
        """Lock the settings, so that no failing job removes them under another; returns whether they exist."""
        try:
            try:
                self._held = self._settings.open("r+", encoding="utf-8")  # some file systems lock only writable files
            except PermissionError:  # another user's
                self._held = self._settings.open(encoding="utf-8")
            with contextlib.suppress(OSError):  # a file system without locks, or a job that is about to remove them
                fcntl.flock(self._held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self._held.fileno()), self._settings.stat())
        except FileNotFoundError:
            return False

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        if old != new:
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            other = ", ".join(f"{name} {old.get(name)!r} instead of {new.get(name)!r}" for name in names)
            raise UserError(f"{self.out} holds shards made with {other}; choose another --out, or the same settings.")

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    def done(self, number: int) -> bool:
        """Whether shard `number` is finished (there is no tar if it holds no samples)."""
        return self._path(number).exists()

    def write(self, number: int, shard: ShardRecord | None, description: Description) -> None:
        """Record that shard `number` is finished."""
        content = {
            "shard": None if shard is None else dataclasses.asdict(shard),
            "members": {name: dataclasses.asdict(spec) for name, spec in description.members.items()},
            "sums": {name: sums.tolist() for name, sums in description.sums.items()},
            "unread": description.unread,
        }
        try:
            write_atomically(self._path(number), json.dumps(content))
        except FileNotFoundError:
            if not self.finished:  # else another job has made the same shard, and was the last
                raise

    def read(self, number: int) -> tuple[ShardRecord | None, Description]:
        """The record of a finished shard."""
        content = json.loads(self._path(number).read_text(encoding="utf-8"))
        description = Description(
            members={n: MemberSpec(dtype=m["dtype"], shape=tuple(m["shape"])) for n, m in content["members"].items()},
            sums={name: np.array(sums) for name, sums in content["sums"].items()},
            unread=content["unread"],
        )
        return None if content["shard"] is None else ShardRecord(**content["shard"]), description

    def remove(self) -> None:
        """Remove the records of a set that has its manifest."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_if_unused(self) -> None:
        """Leave no trace if no shard was finished, and no other job is at work."""
        try:
            if self._held is not None:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            pass  # a file system without locks
        if self.folder.is_dir() and [path.name for path in self.folder.iterdir()] == [self._settings.name]:
            self.remove()
            with contextlib.suppress(OSError):  # it holds something else, or another job's settings by now
                self.out.rmdir()
