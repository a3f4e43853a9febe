"""Shards: plain tars of `KEY.NAME.npy` members and one `KEY.meta.json` per sample, written with the same bytes every time.

All members of one name have one dtype and shape and come in one order, so that a shard is a strided array (see `reader.py`).
Here they are written, and read one by one; training reads them through `stream.py`.
"""

import fcntl
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dpt.data.manifest import Manifest, ShardRecord
from dpt.data.reader import BLOCK, END, MEMBER_ORDER, SampleError, ShardReader, npy_header
from dpt.data.sources import Patience, is_url, open_shard, resolve
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
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(f"{self.path}: another process is writing this shard; give each job its own shards.") from error
        except OSError:
            pass  # a file system without locks
        os.ftruncate(descriptor, 0)
        return os.fdopen(descriptor, "wb", buffering=1 << 20)

    def add(self, key: str, members: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Append one sample. `key` as by `shard_key`; `members`: arrays of the documented names and dtypes."""
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
        for piece in (info.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % BLOCK)):
            self._digest.update(piece)
            self._file.write(piece)
            self._bytes += len(piece)

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


def file_sha256(path: str | Path) -> str:
    """Hash of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardFolder:
    """The samples of a shard folder (or another source, see `sources.resolve`) in order, by number: `len(folder)`, `folder[i]`.

    A sample is a dict: `key` (str), `meta` (dict) and numpy arrays, as documented. `cache_dir`: folder that keeps shards
    fetched from URLs; without one a shard is fetched when a sample of it follows one of another. UserError if the folder or its
    manifest is not whole, or a shard cannot be opened; SampleError names a damaged sample.
    """

    def __init__(self, source: str | Path, *, cache_dir: str = "", patience: Patience | None = None) -> None:
        self.folder = Path(source)
        self._patience, self._cache_dir = patience or Patience(), cache_dir
        self._source = resolve(str(source), self._patience)
        self.manifest: Manifest = self._source.manifest
        self._starts = np.cumsum([0, *(shard.num_samples for shard in self.manifest.shards)])
        self._open: tuple[int, ShardReader] | None = None

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self._starts, number, "right")) - 1
        return self._read(shard, number - int(self._starts[shard]))

    def _read(self, shard: int, row: int) -> dict[str, Any]:
        url = self._source.urls[shard]
        if self._open is None or self._open[0] != shard:
            self.close()
            patience = self._patience if is_url(url) else Patience(retries=0)
            try:
                reader = patience.retry(lambda: open_shard(self._source, shard, patience, self._cache_dir))
            except OSError as error:
                raise UserError(f"{url}: the shard cannot be read ({error.strerror or error}); encode the set anew.") from error
            self._open = (shard, reader)
        try:
            return self._open[1].sample(row)
        except (SampleError, OSError) as error:
            raise SampleError(f"sample {row} of {url}: {error}") from error

    def close(self) -> None:
        """Close the open shard."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


def iter_samples(folder: str | Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """The samples of a shard folder from number `start` on, each as `ShardFolder` gives it."""
    samples = ShardFolder(folder)
    try:
        for number in range(start, len(samples)):
            yield samples[number]
    finally:
        samples.close()
