"""Reading shards: any sample of a tar by its number, in batches without parsing where all samples are laid out alike.

A shard of equal members is a strided array: some samples' headers are parsed, and blocks of neighbouring samples are read
at once and only compared with them. Other tars are walked once and read sample by sample.
Reads, not memory maps: a file that shrinks or a disk that fails is then an error that names the sample, not a dead process.
"""

import ast
import io
import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np

BLOCK = 512
"""A tar's unit: headers are one block, members are padded to whole ones."""
END = bytes(2 * BLOCK)
_KEY = re.compile(r"([^.\0]*)\.[^\0]*\0+")
_LARGE_BYTES = 4096
_MOST_LARGE = 7
"""64 rows with 7 large members are 960 pieces; a system call takes 1024."""
_PROBES = 4
_NPY_HEADER_BYTES = 128


class SampleError(Exception):
    """A sample (or a whole shard) that cannot be read; the text says why."""


@dataclass(frozen=True, kw_only=True)
class MemberLayout:
    """Where a member lies in its sample's row of bytes, in bytes from the row's start."""

    name: str
    header: int
    """Its tar header."""
    data: int
    """Its array's first byte."""
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """A sample's members in order, and the bytes from one sample to the next."""

    members: tuple[MemberLayout, ...]
    stride: int


class RowFormat:
    """How rows of a layout are taken apart while they are read: each large wanted member for itself, and the rest of the row.

    The rest (headers, small members) also tells whether a row is sound: some of its bytes must be as in a sound row.
    """

    def __init__(self, layout: RowLayout, wanted: Sequence[str], sound_row: bytes) -> None:
        self.stride = layout.stride
        self.members = [member for member in layout.members if member.name in wanted]
        self.large = [m for m in self.members if m.nbytes >= _LARGE_BYTES and m.nbytes % 8 == 0][:_MOST_LARGE]
        self.rest_bytes = self.stride - sum(member.nbytes for member in self.large)
        rest = np.frombuffer(sound_row, np.uint8)
        for member in reversed(self.large):
            rest = np.delete(rest, slice(member.data, member.data + member.nbytes))
        last = self.members[-1]
        end = self.rest_at(last.data) + (0 if last in self.large else last.nbytes)
        self.used_bytes = -(-end // 8) * 8
        """Bytes of the rest, from its start, that hold all that is wanted."""
        # Of each member: the low digits of its size and the magic of its tar header, and its whole npy header, in 8-byte words.
        starts = [(self.rest_at(member.header) // 8, self.rest_at(member.data) // 8) for member in self.members]
        self._words = np.concatenate([[tar + 16, tar + 32, *range(tar + 64, data)] for tar, data in starts])
        self._sound = rest.view(np.int64)[self._words]

    def rest_at(self, position: int) -> int:
        """Where the row's byte `position` (outside the large members) lies in the rest."""
        return position - sum(member.nbytes for member in self.large if member.data < position)

    def buffers(self, rest: np.ndarray, large: dict[str, np.ndarray]) -> list[memoryview]:
        """What `preadv` fills, piece by piece, with N rows: `rest` uint8 `[N, rest_bytes]`, `large` uint8 `[N, nbytes]`."""
        pieces: list[tuple[memoryview, int, int, int]] = []
        position = 0
        for member in self.large:
            pieces.append((rest.reshape(-1).data, self.rest_bytes, self.rest_at(position), self.rest_at(member.data)))
            pieces.append((large[member.name].reshape(-1).data, member.nbytes, 0, member.nbytes))
            position = member.data + member.nbytes
        pieces.append((rest.reshape(-1).data, self.rest_bytes, self.rest_at(position), self.rest_bytes))
        return [memory[row * size + a : row * size + b] for row in range(len(rest)) for memory, size, a, b in pieces]

    def sound(self, rest: np.ndarray) -> np.ndarray:
        """Whether rows have the headers that they must have: bool `[N]`. `rest`: at least `used_bytes` of their rest."""
        return np.asarray((rest.view(np.int64)[:, self._words] == self._sound).all(axis=1))


def row_keys(rows: np.ndarray) -> list[str]:
    """The keys in `rows`, uint8 `[N, at least 100]`, which begin with the first member's name."""
    names = rows[:, :100].tobytes()
    keys = _KEY.findall(names.decode("latin1"))  # all at once; a damaged name may hide or add one
    if len(keys) != len(rows):
        keys = [names[at : at + 100].partition(b".")[0].decode("latin1") for at in range(0, len(names), 100)]
    return keys


class ShardReader:
    """The samples of one tar, by number. `num_samples` is what the manifest promises; `name` is for errors."""

    def __init__(self, file: BinaryIO, name: str, num_samples: int) -> None:
        self.name = name
        self.num_samples = num_samples
        self._file = file
        self._descriptor = file.fileno()
        self._sound_row = 0
        self.layout = self._find_layout()
        self._spans = None if self.layout else self._walk()

    def _find_layout(self) -> RowLayout | None:
        """The rows' common layout, or None if probed rows differ for another reason than damage."""
        size, count = os.fstat(self._descriptor).st_size, self.num_samples
        whole = size > len(END) and (size - len(END)) % count == 0  # the size of a shard of ours that is not truncated
        first = _parse_row(self._descriptor, 0)
        stride = (size - len(END)) // count if whole else first.stride if first else 0
        if stride == 0 or size < stride:
            return None
        last = min(count, size // stride) - 1  # a truncated shard keeps its whole rows
        rows = sorted({round(last * i / _PROBES) for i in range(_PROBES + 1)})
        found = {row: _parse_row(self._descriptor, row * stride) for row in rows}
        layout, votes = Counter(found.values()).most_common(1)[0]
        if layout is None or layout.stride != stride or votes < len(rows) * (0.5 if whole else 1.0):
            return None
        self._sound_row = next(row for row in rows if found[row] == layout)
        return layout

    def _walk(self) -> list[tuple[int, int]]:
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
                raise SampleError(f"{self.name} is no readable tar ({error})") from error
        if names and names[-1] != names[0]:
            spans.pop()  # cut off after some of its members
        return spans

    def row_format(self, wanted: Sequence[str]) -> RowFormat:
        """The common format of the rows; only for tars with a layout."""
        assert self.layout is not None
        row = os.pread(self._descriptor, self.layout.stride, self._sound_row * self.layout.stride)
        return RowFormat(self.layout, wanted, row)

    def read_rows(self, first: int, buffers: Sequence[memoryview]) -> int:
        """Read neighbouring rows from number `first` on into `buffers`. Returns how many came whole."""
        assert self.layout is not None
        return os.preadv(self._descriptor, buffers, first * self.layout.stride) // self.layout.stride

    def sample(self, row: int, members: Sequence[str] | None = None) -> dict[str, Any]:
        """One sample: `key`, its arrays and `meta` (dict); of the arrays only `members` if given. SampleError if damaged,
        OSError if the file cannot be read."""
        if self.layout:
            start, end = row * self.layout.stride, (row + 1) * self.layout.stride
        elif self._spans is not None and row < len(self._spans):
            start, end = self._spans[row]
        else:
            raise SampleError("the tar is truncated")
        content = os.pread(self._descriptor, end - start, start)
        if len(content) < end - start:
            raise SampleError("the tar is truncated")
        return _parse_sample(content, members)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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


def _parse_row(descriptor: int, offset: int) -> RowLayout | None:
    """Layout of the sample whose first header is at `offset`; None if a plain parser cannot tell."""
    members: list[MemberLayout] = []
    position, first_key = offset, None
    while True:
        block = os.pread(descriptor, BLOCK, position)
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except tarfile.HeaderError:
            break  # the end, or damage, which the caller's comparison finds
        key, rest = _split_name(info.name)
        first_key = first_key or key
        if key != first_key:
            break
        plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not any(block[345:500])  # no prefixed or extended name
        if not plain or "." in key:
            return None
        name, _, extension = rest.rpartition(".")
        if extension == "npy":
            described = _npy_layout(os.pread(descriptor, min(info.size, _NPY_HEADER_BYTES), position + BLOCK), info.size)
            if described is None:
                return None
            skip, dtype, shape = described
            start = position + BLOCK + skip - offset
            nbytes = info.size - skip
            members.append(
                MemberLayout(name=name, header=position - offset, data=start, nbytes=nbytes, dtype=dtype, shape=shape)
            )
        position += BLOCK + -(-info.size // BLOCK) * BLOCK
    return RowLayout(members=tuple(members), stride=position - offset) if members else None


def _npy_layout(content: bytes, size: int) -> tuple[int, str, tuple[int, ...]] | None:
    """(header bytes, dtype, shape) of a version 1.0 .npy file of `size` bytes in C order; None for any other."""
    skip = 10 + int.from_bytes(content[8:10], "little")
    described = _npy_header(content[10:skip]) if content[:8] == b"\x93NUMPY\x01\x00" and skip <= len(content) else None
    if described is None:
        return None
    dtype, shape, nbytes = described
    return (skip, dtype, shape) if skip + nbytes == size else None


@lru_cache(maxsize=256)
def _npy_header(text: bytes) -> tuple[str, tuple[int, ...], int] | None:
    try:
        header = ast.literal_eval(text.decode("latin1"))
        dtype, shape = np.dtype(header["descr"]), tuple(int(side) for side in header["shape"])
    except (ValueError, SyntaxError, KeyError, TypeError):
        return None
    if dtype.hasobject or header.get("fortran_order"):
        return None
    return dtype.str, shape, dtype.itemsize * math.prod(shape)
