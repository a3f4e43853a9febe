"""A run's records on disk: an append-only file of JSON lines, and a cursor up to which they have been sent.

`OUTPUT_DIR/tracking/RUN_ID.jsonl` holds the records, `RUN_ID.state.json` the cursor, `RUN_ID.lock` is held by whoever sends.
One record is one `write` of one line, so that a kill leaves at most one broken last line; readers take whole lines only.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpt.errors import hide_passwords

COPY_LIMIT = 32 * 2**20
"""Files up to this many bytes are copied into the spool; larger ones (weights) are sent from where they are."""

_CHUNK_BYTES = 4 * 2**20


@dataclass(kw_only=True)
class SpoolState:
    """Progress of the sending."""

    offset: int = 0
    """Bytes of the records file that have been sent."""
    mlflow_run_id: str = ""
    """MLflow's own id of the run, once it has one."""
    uri: str = ""
    """Store that the records went to."""
    error: str = ""
    """Why the last attempt to send failed; empty if it did not."""
    rejected: int = 0
    """Records that the store permanently refused."""


class Spool:
    """The records of one run in `folder`, or those that a node other than the run's first adds to it (`node`)."""

    def __init__(self, folder: Path, run_id: str, node: str = "") -> None:
        self.folder = Path(folder)
        self.run_id = run_id
        self.name = f"{run_id}.{node}" if node else run_id
        self.joins = bool(node)
        self.path = self.folder / f"{self.name}.jsonl"
        self.log = self.folder / f"{self.name}.log"
        self._state_path = self.folder / f"{self.name}.state.json"
        self._file = -1

    @classmethod
    def at(cls, path: Path) -> "Spool":
        """The spool whose records are in the file `path`."""
        run_id, _, node = path.stem.partition(".")
        return cls(path.parent, run_id, node)

    @classmethod
    def find(cls, root: Path) -> list["Spool"]:
        """Every spool below `root`, oldest first (so that parents are sent before their children)."""
        spools = [cls.at(p) for p in sorted(Path(root).rglob("*.jsonl")) if p.parent.name == "tracking"]
        return sorted(spools, key=lambda spool: next((int(record.get("time", 0)) for record, _ in spool.read()), 0))

    def append(self, record: dict[str, Any]) -> None:
        """Write one record, with passwords in addresses removed; raises OSError if the disk does."""
        if self._file < 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if os.fstat(self._file).st_size and not self._ends_with_newline():
                os.write(self._file, b"\n")
        os.write(self._file, hide_passwords(json.dumps(record)).encode() + b"\n")

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def close(self) -> None:
        """Close the records file; a later append opens it again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def read(self, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the whole records from byte `offset` on, each with the offset after it; broken lines are skipped."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                record = _parse(line)
                if record is not None:
                    yield record, offset

    def last_steps(self) -> dict[str, int]:
        """The highest step recorded of every metric."""
        steps: dict[str, int] = {}
        for record, _ in self.read():
            if record["kind"] == "metrics":
                for name in record["values"]:
                    steps[name] = max(record["step"], steps.get(name, record["step"]))
        return steps

    @property
    def state(self) -> SpoolState:
        """The cursor as last written."""
        try:
            return SpoolState(**json.loads(self._state_path.read_text()))
        except (OSError, ValueError, TypeError):
            return SpoolState()

    def write_state(self, state: SpoolState) -> None:
        """Replace the cursor atomically."""
        temporary = self._state_path.with_suffix(".tmp")
        temporary.write_text(hide_passwords(json.dumps(asdict(state))))
        os.replace(temporary, self._state_path)

    @property
    def size(self) -> int:
        """Bytes of records so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def unsent(self) -> int:
        """Number of records after the cursor."""
        return sum(1 for _ in self.read(self.state.offset))

    def keep_file(self, path: Path, name: str) -> Path:
        """Return a copy named `name` that later changes cannot reach; for large files and folders, the path itself."""
        if path.is_dir() or path.stat().st_size > COPY_LIMIT:
            return path.absolute()
        folder = self.folder / "files" / self.run_id
        folder.mkdir(parents=True, exist_ok=True)
        copy = Path(tempfile.mkdtemp(dir=folder)) / name
        shutil.copyfile(path, copy)
        return copy.absolute()

    @contextmanager
    def locked(self, *, wait: bool) -> Iterator[bool]:
        """Hold the right to send; yields False if another process has it and `wait` is False."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError:  # a file system without locks; sending twice at once adds nothing, the store drops equal points
                pass
            yield True


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None
