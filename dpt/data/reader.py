"""Reading shards: any sample of a tar by its number, and without parsing where all samples are laid out as our writer does.

The manifest tells which bytes such a sample has for headers, and where its arrays are: a shard is then an array of rows. Blocks
of neighbouring rows are read at once and only compared with it. Other tars are walked once and read sample by sample.
Reads, not memory maps: a file that shrinks or a disk that fails is then an error that names the sample, not a dead process.
"""

import io
import json
import math
import os
import sys
import tarfile
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np

from dpt.data.manifest import MemberSpec, ShardRecord

BLOCK = 512
"""A tar's unit: headers are one block, members are padded to whole ones."""
END = bytes(2 * BLOCK)
MEMBER_ORDER = (
    "label", "valid", "clip", "latents", "latents_mirrored", "cond_latents", "target_latents", "image", "truth", "code_mask",
)  # fmt: skip
"""Order of the arrays in a sample; `meta` follows."""
_PROBES = 4


class SampleError(Exception):
    """A sample (or a whole shard) that cannot be read; the text says why."""


@lru_cache(maxsize=256)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of a version 1.0 .npy file in C order; `dtype`: numpy's name of it."""
    buffer = io.BytesIO()
    descr = np.dtype(dtype).newbyteorder("<").str
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Neighbouring samples of a shard. arrays: `[N, ...]` by member; sound: False for those to be read alone."""

    arrays: Mapping[str, np.ndarray]
    keys: Sequence[str]
    sound: Sequence[bool]


class ShardReader:
    """The samples of one tar, by number, for any number of threads. The file is closed with the last reference.

    record, members: what the manifest promises; `name` is for errors. SampleError if it is no tar at all.
    """

    def __init__(self, file: BinaryIO, name: str, record: ShardRecord, members: Mapping[str, MemberSpec]) -> None:
        self._file, self._descriptor, self._members = file, file.fileno(), members
        self.close = weakref.finalize(self, file.close)
        """Close the file."""
        self._layout: dict[str, tuple[slice, np.ndarray, np.ndarray]] = {}
        """Of each member in a row of bytes: its array, and the 8-byte words of its headers with what they must be."""
        self._stride = 0 if any(-1 in spec.shape for spec in members.values()) else self._lay_out(record)
        size = os.fstat(self._descriptor).st_size
        whole = min(record.num_samples, size // (self._stride or sys.maxsize))  # less if it is truncated
        probes = sorted({(whole - 1) * i // _PROBES for i in range(_PROBES + 1)} if whole else ())
        sound = sum(bool(self._read(row, np.empty((1, self._stride), np.uint8), members)[0]) for row in probes)
        self._spans: list[tuple[int, int]] = []
        """Where the samples are, first byte and end, of a tar that is no array of rows."""
        if sound < max(1, len(probes) * (0.5 if size == record.bytes else 1.0)):
            self._stride, self._spans = 0, self._walk(name)

    def _lay_out(self, record: ShardRecord) -> int:
        """Note where a row of our writer's has what; returns its bytes, or 0 if the manifest tells that rows differ."""
        position = 0
        for name in (name for name in MEMBER_ORDER if name in self._members):
            spec = self._members[name]
            header, nbytes = npy_header(spec.dtype, spec.shape), np.dtype(spec.dtype).itemsize * math.prod(spec.shape)
            info = tarfile.TarInfo(name)
            info.size = len(header) + nbytes
            # In 8-byte words: the low digits of the size and the magic of the tar header, and the whole npy header.
            words = np.array([16, 32, *range(BLOCK // 8, (BLOCK + len(header)) // 8)])
            expected = np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT) + header, np.int64)[words]
            start = position + BLOCK + len(header)
            self._layout[name] = (slice(start, start + nbytes), words + position // 8, expected)
            position += BLOCK + -(-info.size // BLOCK) * BLOCK
        stride, rest = divmod(record.bytes - len(END), record.num_samples)
        return 0 if rest or stride % BLOCK or stride < position else stride

    def rows(self, first: int, count: int, wanted: Collection[str]) -> Rows:
        """Read members of `count` rows from number `first` on. What is not as promised, or cut off, is not sound."""
        if not self._stride:
            return Rows(arrays={}, keys=[""] * count, sound=[False] * count)
        content = np.empty((count, self._stride), np.uint8)
        sound = self._read(first, content, wanted)
        names = content[:, :100].copy().view("S100")[:, 0].tolist()
        keys = [name.partition(b".")[0].decode("latin1") for name in names]
        specs = {name: self._members[name] for name in wanted}
        arrays = {
            name: content[:, self._layout[name][0]].view(spec.dtype).reshape(count, *spec.shape) for name, spec in specs.items()
        }
        return Rows(arrays=arrays, keys=keys, sound=sound.tolist())

    def _read(self, first: int, content: np.ndarray, wanted: Collection[str]) -> np.ndarray:
        """Read rows into `content`, uint8 `[N, stride]`. Which of them came and have the headers that they must have."""
        sound = np.zeros(len(content), bool)
        whole = os.preadv(self._descriptor, [content.data], first * self._stride) // self._stride
        words, expected = (np.concatenate([self._layout[name][i] for name in wanted]) for i in (1, 2))
        sound[:whole] = (content[:whole].view(np.int64)[:, words] == expected).all(axis=1)
        return sound

    def sample(self, row: int, members: Sequence[str] | None = None) -> dict[str, Any]:
        """One sample: `key`, its arrays and `meta` (dict); of the arrays only `members` if given. SampleError if damaged,
        OSError if the file cannot be read."""
        if self._stride:
            start, end = row * self._stride, (row + 1) * self._stride
        elif row < len(self._spans):
            start, end = self._spans[row]
        else:
            raise SampleError("the tar is truncated")
        content = os.pread(self._descriptor, end - start, start)
        if len(content) < end - start:
            raise SampleError("the tar is truncated")
        return _parse_sample(content, members)

    def _walk(self, name: str) -> list[tuple[int, int]]:
        """(first byte, end) of every complete sample of a tar whose samples differ."""
        spans: list[tuple[int, int]] = []
        names: list[list[str]] = []
        size = os.fstat(self._descriptor).st_size
        last_key = None
        try:
            self._file.seek(0)
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                for info in tar:
                    end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                    key, rest = _split_name(info.name)
                    if not info.isfile() or end > size:
                        continue
                    if key == last_key:
                        spans[-1] = (spans[-1][0], end)
                        names[-1].append(rest)
                    else:
                        spans.append((info.offset, end))
                        names.append([rest])
                    last_key = key
        except (tarfile.TarError, OSError) as error:
            if not spans:
                raise SampleError(f"{name} is no readable tar ({error})") from error
        if names and names[-1] != names[0]:
            spans.pop()  # cut off after some of its members
        return spans


def _split_name(name: str) -> tuple[str, str]:
    """ "a/b.latents.npy" -> ("a/b", "latents.npy"): a key ends at the first dot of the last part (as in WebDataset)."""
    folder, slash, base = name.rpartition("/")
    key, _, rest = base.partition(".")
    return folder + slash + key, rest


def _parse_sample(content: bytes, wanted: Sequence[str] | None) -> dict[str, Any]:
    sample: dict[str, Any] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for info in tar:
                key, rest = _split_name(info.name)
                if sample.setdefault("key", key) != key:
                    raise SampleError("its members have different keys")
                name, _, extension = rest.rpartition(".")
                data = content[info.offset_data : info.offset_data + info.size]
                if extension == "json":
                    sample[name] = json.loads(data)
                elif extension == "npy" and (wanted is None or name in wanted):
                    sample[name] = np.load(io.BytesIO(data), allow_pickle=False)
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise SampleError(f"it is damaged ({error})") from error
    if missing := [name for name in (*(wanted or ()), "meta") if name not in sample]:
        raise SampleError(f"it has no member {missing[0]}")
    return sample
