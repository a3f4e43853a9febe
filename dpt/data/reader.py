"""Reading shards: any sample of a tar by its number, and without parsing where all samples are laid out alike.

A shard of equal members is an array of rows: some samples' headers are parsed, and blocks of neighbouring samples are read
at once and only compared with them. Other tars are walked once and read sample by sample.
Reads, not memory maps: a file that shrinks or a disk that fails is then an error that names the sample, not a dead process.
"""

import io
import json
import math
import os
import tarfile
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np

from dpt.data.manifest import MemberSpec

BLOCK = 512
"""A tar's unit: headers are one block, members are padded to whole ones."""
END = bytes(2 * BLOCK)
_PROBES = 4
_NPY_HEADER_BYTES = 128


class SampleError(Exception):
    """A sample (or a whole shard) that cannot be read; the text says why."""


@dataclass(frozen=True, kw_only=True)
class MemberLayout:
    """Where a member lies in its sample's row of bytes: its tar header and its array's first byte, from the row's start."""

    name: str
    header: int
    data: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """A sample's members in order, and the bytes from one sample to the next."""

    members: tuple[MemberLayout, ...]
    stride: int

    def holds(self, promised: Mapping[str, MemberSpec]) -> bool:
        """Whether the members named are there with the dtype and shape promised."""
        found = {member.name: MemberSpec(dtype=np.dtype(member.dtype).name, shape=member.shape) for member in self.members}
        return all(found.get(name) == spec for name, spec in promised.items())


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Neighbouring samples of a shard. arrays: `[N, ...]` by member; sound: bool `[N]`, False for those to be read alone."""

    arrays: Mapping[str, np.ndarray]
    keys: Sequence[str]
    sound: np.ndarray


class ShardReader:
    """The samples of one tar, by number, for any number of threads. The file is closed with the last reference.

    `num_samples` is what the manifest promises; `name` is for errors. SampleError if it is no tar at all.
    """

    def __init__(self, file: BinaryIO, name: str, num_samples: int) -> None:
        self.name, self.num_samples = name, num_samples
        self._file, self._descriptor = file, file.fileno()
        self.close = weakref.finalize(self, file.close)
        """Close the file."""
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
        sound = next(row for row in rows if found[row] == layout)
        self._sound_row = np.frombuffer(os.pread(self._descriptor, stride, sound * stride), np.int64)
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

    def rows(self, first: int, count: int, promised: Mapping[str, MemberSpec]) -> Rows:
        """Read the members `promised` of `count` rows from number `first` on. What differs, or is cut off, is not sound."""
        sound = np.zeros(count, bool)
        if self.layout is None or not self.layout.holds(promised):
            return Rows(arrays={}, keys=[""] * count, sound=sound)
        words, table = _row_format(self.layout, tuple(promised))
        content = np.empty((count, self.layout.stride), np.uint8)
        whole = os.preadv(self._descriptor, [content.data], first * self.layout.stride) // self.layout.stride
        sound[:whole] = (content[:whole].view(np.int64)[:, words] == self._sound_row[words]).all(axis=1)
        names = content[:, :100].copy().view("S100")[:, 0].tolist()
        keys = [name.partition(b".")[0].decode("latin1") for name in names]
        samples = content.reshape(-1).view(table)
        return Rows(arrays={name: samples[name] for name in promised}, keys=keys, sound=sound)

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


@lru_cache(maxsize=256)
def _row_format(layout: RowLayout, wanted: tuple[str, ...]) -> tuple[np.ndarray, np.dtype]:
    """Which 8-byte words of a row are the same in every sound one, and a row as a record with the wanted members as fields."""
    members = [member for member in layout.members if member.name in wanted]
    # Of each member: the low digits of its size and the magic of its tar header, and its whole npy header.
    words = [[m.header // 8 + 16, m.header // 8 + 32, *range(m.header // 8 + 64, m.data // 8)] for m in members]
    fields = {
        "names": [member.name for member in members],
        "formats": [(member.dtype, member.shape) for member in members],
        "offsets": [member.data for member in members],
        "itemsize": layout.stride,
    }
    return np.concatenate(words), np.dtype(fields)  # type: ignore[call-overload]


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
            members.append(MemberLayout(name=name, header=position - offset, data=start, dtype=dtype, shape=shape))
        position += BLOCK + -(-info.size // BLOCK) * BLOCK
    return RowLayout(members=tuple(members), stride=position - offset) if members else None


def _npy_layout(content: bytes, size: int) -> tuple[int, str, tuple[int, ...]] | None:
    """(header bytes, dtype, shape) of a version 1.0 .npy file of `size` bytes in C order; None for any other."""
    file = io.BytesIO(content)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return None
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        return None
    plain = not (fortran_order or dtype.hasobject) and file.tell() + dtype.itemsize * math.prod(shape) == size
    return (file.tell(), dtype.str, shape) if plain else None
