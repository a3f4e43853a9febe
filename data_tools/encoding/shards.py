"""Writing shards: plain tars of `KEY.NAME.npy` members and one `KEY.meta.json` per sample, with the same bytes every time.

Members come in one order, all of one name with one dtype and shape: a shard is an array of rows (`dpt/data/reader.py`).
"""

import fcntl
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dpt.data.manifest import MEMBER_ORDER, ShardRecord
from dpt.data.reader import BLOCK, END, npy_header
from dpt.errors import UserError

_DTYPES = ("float16", "float32", "int64", "uint8")
_MAX_NAME = 100


def shard_key(key: str) -> str:
    """A sample's key as a member name: letters, digits, `_`, `-` and `/`, at most 72 characters, different for different keys.

    Dots end a key for WebDataset, and `..` or a leading `/` could leave the folder a shard is unpacked in; a key that had to be
    changed gets eight digits of its hash.
    """
    clean = re.sub(r"[^A-Za-z0-9_/-]+", "_", key)
    clean = re.sub(r"/+", "/", clean).strip("/")
    if clean == key and 0 < len(clean) <= 72:
        return clean
    return f"{clean[-63:].strip('/')}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


class ShardWriter:
    """Writes one tar under a temporary name and renames it when complete. A context manager: an exception leaves nothing.

    `path`: the final name. UserError if another process is writing the same shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_samples = 0
        self._temporary = path.with_name(f".{path.name}.part")
        self._file = self._open()
        self._digest = hashlib.sha256()
        self._bytes = 0

    def _open(self) -> BinaryIO:
        # A killed writer leaves its temporary file; the next one takes it over. The lock dies with its process.
        descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT, 0o644)
        taken = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have given it the shard's name meanwhile: then what is locked here is finished.
            taken = not os.path.samestat(os.fstat(descriptor), self._temporary.stat())
        except (BlockingIOError, FileNotFoundError):
            taken = True
        except OSError:
            pass  # a file system without locks
        if taken:
            os.close(descriptor)
            raise UserError(f"{self.path}: another process is writing this shard; give each job its own shards.")
        os.ftruncate(descriptor, 0)
        return os.fdopen(descriptor, "wb", buffering=1 << 20)

    def add(self, key: str, members: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Append one sample. `key`: from `shard_key`; `members`: arrays of the documented names and dtypes."""
        assert set(members) <= set(MEMBER_ORDER), f"unknown members {set(members) - set(MEMBER_ORDER)}"
        for name in MEMBER_ORDER:
            if name in members:
                self._write(f"{key}.{name}.npy", npy_bytes(members[name]))
        text = json.dumps(dict(meta), sort_keys=True).encode()
        self._write(f"{key}.meta.json", text.ljust(-(-len(text) // BLOCK) * BLOCK))
        self.num_samples += 1

    def _write(self, name: str, content: bytes) -> None:
        assert len(name) <= _MAX_NAME, f"member name {name} is too long"
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for chunk in (info.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % BLOCK)):
            self._digest.update(chunk)
            self._file.write(chunk)
            self._bytes += len(chunk)

    def commit(self) -> ShardRecord:
        """Finish the tar and give it its name."""
        self._file.write(END)
        self._digest.update(END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._temporary.replace(self.path)
        self._file.close()
        return ShardRecord(
            name=self.path.name, num_samples=self.num_samples, sha256=self._digest.hexdigest(), bytes=self._bytes + len(END)
        )

    def abort(self) -> None:
        """Leave nothing behind."""
        if not self._file.closed:
            self._temporary.unlink(missing_ok=True)
            self._file.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *rest: object) -> None:
        if error_type is None and not self._file.closed:
            self.commit()
        else:
            self.abort()


def npy_bytes(array: np.ndarray) -> bytes:
    """`array` as a version 1.0 .npy file, little-endian, C order."""
    assert array.dtype.name in _DTYPES, f"members have dtype {', '.join(_DTYPES)}, not {array.dtype}"
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return npy_header(array.dtype.name, array.shape) + little.tobytes(order="C")
