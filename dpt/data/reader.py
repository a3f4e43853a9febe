"""Reading shards: any sample of a tar by its number, in batches without parsing where all samples are laid out alike.

A shard of equal members is a strided array: the first sample's headers are parsed, and every further sample is one `preadv`
straight into the batch, its headers compared with the first's. Other tars are walked once and read sample by sample.
Reads, not memory maps: a file that shrinks or a disk that fails is then an error that names the sample, not a dead process.
"""

import ast
import io
import json
import math
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dpt.data.manifest import Manifest, read_manifest
from dpt.data.shards import BLOCK, END
from dpt.errors import UserError

_DIRECT_BYTES = 4096
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


class RowPlan:
    """How the wanted members of many rows are read: one `preadv` a row, large members straight to their place in the batch.

    All the rest (tar and npy headers, small members) goes to a scratch row, where it is compared with the first sample's.
    """

    def __init__(self, layout: RowLayout, wanted: Sequence[str], sound_row: bytes) -> None:
        self.members = [member for member in layout.members if member.name in wanted]
        assert len(self.members) == len(wanted), f"members {wanted} are not all in {layout}"
        self.start = self.members[0].header
        self.nbytes = self.members[-1].data + self.members[-1].nbytes - self.start
        self.large = [member for member in self.members if member.nbytes >= _DIRECT_BYTES]
        self.scratch_bytes = self.nbytes - sum(member.nbytes for member in self.large)
        scratch = b""
        position = self.start
        self._cuts: list[tuple[int, int]] = []
        for member in self.large:
            self._cuts.append((len(scratch), len(scratch) + member.data - position))
            scratch += sound_row[position : member.data]
            position = member.data + member.nbytes
        self._cuts.append((len(scratch), self.scratch_bytes))
        self._template = np.frombuffer(scratch + sound_row[position : self.start + self.nbytes], np.uint8)
        self._mask = self._constant_bytes()

    def _constant_bytes(self) -> np.ndarray:
        """255 where a sample's scratch row must equal the first one's: size, type and format of the tar header, npy header."""
        mask = np.zeros(self.scratch_bytes, np.uint8)
        for member in self.members:
            at = self.scratch_at(member.header)
            for start, stop in ((124, 136), (156, 157), (257, 263), (345, 500), (BLOCK, member.data - member.header)):
                mask[at + start : at + stop] = 255
        return mask

    def scratch_at(self, position: int) -> int:
        """Where the row's byte `position` lies in the scratch row."""
        return position - self.start - sum(member.nbytes for member in self.large if member.data < position)

    def read(
        self, sources: Sequence[tuple[int, int]], slots: Sequence[int], arrays: dict[str, np.ndarray], keys: list[str]
    ) -> dict[int, str]:
        """Read rows into the batch. Returns {slot: reason} of those that failed.

        sources: (file descriptor, byte offset of the row) each; slots: their places in `arrays` (contiguous `[B, ...]`)
        and `keys`.
        """
        scratch = np.empty((len(sources), self.scratch_bytes), np.uint8)
        flat = scratch.reshape(-1).data
        targets = [(arrays[m.name].data.cast("B"), m.nbytes) for m in self.large]
        failed: dict[int, str] = {}
        base = 0
        for (descriptor, offset), slot in zip(sources, slots, strict=True):
            buffers = []
            for (target, size), (start, stop) in zip(targets, self._cuts, strict=False):
                buffers.append(flat[base + start : base + stop])
                buffers.append(target[slot * size : (slot + 1) * size])
            start, stop = self._cuts[-1]
            if stop > start:
                buffers.append(flat[base + start : base + stop])
            try:
                if os.preadv(descriptor, buffers, offset + self.start) != self.nbytes:
                    failed[slot] = "the tar is truncated"
            except OSError as error:
                failed[slot] = error.strerror or str(error)
            base += self.scratch_bytes
        self._unpack(scratch, slots, arrays, keys, failed)
        return failed

    def _unpack(
        self, scratch: np.ndarray, slots: Sequence[int], arrays: dict[str, np.ndarray], keys: list[str], failed: dict[int, str]
    ) -> None:
        differs = ((scratch ^ self._template) & self._mask).any(axis=1)
        names = scratch[:, :100].tobytes()
        suffix = f"{self.members[0].name}.npy".encode()
        for i, (slot, bad) in enumerate(zip(slots, differs.tolist(), strict=True)):
            key, _, rest = names[100 * i : 100 * (i + 1)].rstrip(b"\0").partition(b".")
            if (bad or rest != suffix) and slot not in failed:
                failed[slot] = "its headers are damaged"
            keys[slot] = key.decode(errors="replace")
        places = np.asarray(slots)
        for member in self.members:
            if member.nbytes < _DIRECT_BYTES:
                at = self.scratch_at(member.data)
                values = np.ascontiguousarray(scratch[:, at : at + member.nbytes]).view(member.dtype)
                arrays[member.name][places] = values.reshape(len(places), *member.shape)


class ShardReader:
    """The samples of one tar, by number. `num_samples` is what the manifest promises; `name` is for errors."""

    def __init__(self, file: BinaryIO, name: str, num_samples: int) -> None:
        self.name = name
        self.num_samples = num_samples
        self._file = file
        self.descriptor = file.fileno()
        self._sound_row = 0
        self.layout = self._find_layout()
        self._spans = None if self.layout else self._walk()

    def _find_layout(self) -> RowLayout | None:
        """The rows' common layout, or None if probed rows differ for another reason than damage."""
        size, count = os.fstat(self.descriptor).st_size, self.num_samples
        whole = size > len(END) and (size - len(END)) % count == 0  # the size of a shard of ours that is not truncated
        first = _parse_row(self.descriptor, 0)
        stride = (size - len(END)) // count if whole else first.stride if first else 0
        if stride == 0 or size < stride:
            return None
        last = min(count, size // stride) - 1  # a truncated shard keeps its whole rows
        rows = sorted({round(last * i / _PROBES) for i in range(_PROBES + 1)})
        found = {row: _parse_row(self.descriptor, row * stride) for row in rows}
        layout, votes = Counter(found.values()).most_common(1)[0]
        if layout is None or layout.stride != stride or votes < len(rows) * (0.5 if whole else 1.0):
            return None
        self._sound_row = next(row for row in rows if found[row] == layout)
        return layout

    def _walk(self) -> list[tuple[int, int]]:
        """(first byte, end) of every complete sample of a tar whose samples differ."""
        spans: list[tuple[int, int]] = []
        names: list[list[str]] = []
        size = os.fstat(self.descriptor).st_size
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

    def plan(self, wanted: Sequence[str]) -> RowPlan:
        """How the members `wanted` of many rows are read at once; only for tars with a layout."""
        assert self.layout is not None
        row = os.pread(self.descriptor, self.layout.stride, self._sound_row * self.layout.stride)
        return RowPlan(self.layout, wanted, row)

    def sample(self, row: int, members: Sequence[str] | None = None) -> dict[str, Any]:
        """One sample: `key`, its arrays and `meta` (dict); of the arrays only `members` if given. SampleError if damaged."""
        if self.layout:
            start, end = row * self.layout.stride, (row + 1) * self.layout.stride
        elif self._spans is not None and row < len(self._spans):
            start, end = self._spans[row]
        else:
            raise SampleError("the tar is truncated")
        try:
            content = os.pread(self.descriptor, end - start, start)
        except OSError as error:
            raise SampleError(error.strerror or str(error)) from error
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


class ShardFolder:
    """The samples of a local shard folder in order, by number: `len(folder)`, `folder[i]`.

    A sample is a dict: `key` (str), `meta` (dict) and numpy arrays, as documented. UserError if the folder or its manifest is
    not whole; SampleError names a damaged sample.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        counts = [shard.num_samples for shard in self.manifest.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._open: tuple[int, ShardReader] | None = None

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self._starts, number, "right")) - 1
        return self._read(shard, number - int(self._starts[shard]))

    def _read(self, shard: int, row: int) -> dict[str, Any]:
        record = self.manifest.shards[shard]
        path = self.folder / record.name
        if self._open is None or self._open[0] != shard:
            self.close()
            try:
                self._open = (shard, ShardReader(path.open("rb"), str(path), record.num_samples))
            except OSError as error:
                raise UserError(f"{path}: the shard cannot be read ({error.strerror}); encode the set anew.") from error
        try:
            return self._open[1].sample(row)
        except SampleError as error:
            raise SampleError(f"sample {row} of {path}: {error}") from error

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
