"""Reading shards: any sample of a tar by its number, and without parsing where all samples are laid out as our writer does.

The manifest tells which bytes such a sample has for headers, and where its arrays are: a shard is then an array of rows. Blocks
of neighbouring rows are read at once, taken apart by the read itself, and their headers only compared with what they must be.
Other tars are walked once and read sample by sample.
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
_MOST_BUFFERS = 1024
"""What one read can fill (Linux's IOV_MAX)."""


class SampleError(Exception):
    """A sample (or a whole shard) that cannot be read; the text says why."""


@lru_cache(maxsize=256)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of a version 1.0 .npy file in C order; `dtype`: numpy's name of it."""
    buffer = io.BytesIO()
    descr = np.dtype(dtype).newbyteorder("<").str
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def row_bytes(record: ShardRecord, members: Mapping[str, MemberSpec]) -> int:
    """Bytes from one sample of a shard to the next if it can be an array of rows; 0 if the manifest tells that it is none."""
    if any(-1 in spec.shape for spec in members.values()):
        return 0
    stride, rest = divmod(record.bytes - len(END), record.num_samples)
    least = sum(BLOCK + -(-_npy_bytes(spec) // BLOCK) * BLOCK for spec in members.values())
    return 0 if rest or stride % BLOCK or stride < least else stride


def _npy_bytes(spec: MemberSpec) -> int:
    return len(npy_header(spec.dtype, spec.shape)) + np.dtype(spec.dtype).itemsize * math.prod(spec.shape)


class Rows:
    """Memory for blocks of rows, taken apart by member; reused for ever, as fresh pages cost as much as filling them.

    members: all of a set; wanted: those to keep; stride: bytes of the longest row. It has room for `slots` blocks of `block`
    rows, but is memory only where it was once read into.
    """

    def __init__(self, members: Mapping[str, MemberSpec], wanted: Collection[str], stride: int, block: int, slots: int) -> None:
        self.block, self._free = block, list(range(slots))[::-1]
        self.arrays: dict[str, np.ndarray] = {}
        """The wanted members, `[slots * block, ...]`."""
        self.sound = np.zeros(slots * block, bool)
        """Which rows came whole and have the headers that they must have."""
        layout, expected, position = [], [], 0
        for name in (name for name in MEMBER_ORDER if name in members):
            spec = members[name]
            header, info = npy_header(spec.dtype, spec.shape), tarfile.TarInfo(name)
            info.size = _npy_bytes(spec)
            if name in wanted:
                self.arrays[name] = np.empty((slots * block, *spec.shape), spec.dtype)
                layout.append((name, position, position + BLOCK + len(header)))
                expected.append(np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT) + header, np.int64))
            position += BLOCK + -(-info.size // BLOCK) * BLOCK
        self._headers = np.empty((slots * block, 8 * sum(map(len, expected))), np.uint8)
        self._pieces: list[tuple[memoryview, int, int, int]] = []
        """Where a row's bytes go, in order: memory, its bytes for a row, and the first of these and how many."""
        self._buffers: dict[tuple[int, int], list[memoryview]] = {}
        self._unread = memoryview(bytearray(stride))
        checked, width, done = [], 0, 0
        for name, start, data in layout:
            array, size = self.arrays[name].reshape(-1).view(np.uint8).data, self.arrays[name][0].nbytes
            self._pieces.append((self._unread, 0, 0, start - done))
            self._pieces.append((self._headers.reshape(-1).data, self._headers.shape[1], width, data - start))
            self._pieces.append((array, size, 0, size))
            # In 8-byte words: the low digits of the size and the magic of the tar header, and the whole npy header.
            checked += [(width // 8 + word) for word in (16, 32, *range(BLOCK // 8, (data - start) // 8))]
            width, done = width + data - start, data + size
        self._end = done
        self._checked, self._expected = np.array(checked), np.concatenate(expected)[checked]

    def take(self) -> int:
        """First row of an unused slot."""
        return self._free.pop() * self.block

    def give_back(self, first: int) -> None:
        """The slot that begins at row `first` is not needed any more."""
        self._free.append(first // self.block)

    def read(self, descriptor: int, offset: int, stride: int, at: int, count: int) -> None:
        """Read `count` rows of a file, `stride` bytes each from byte `offset` on, into the rows from number `at` on."""
        if (at, stride) not in self._buffers:
            pieces = [*self._pieces, (self._unread, 0, 0, stride - self._end)]
            self._buffers[at, stride] = [
                memory[row * width + first : row * width + first + size]
                for row in range(at, at + self.block)
                for memory, width, first, size in pieces
            ]
        buffers, of_row = self._buffers[at, stride], len(self._pieces) + 1
        self.sound[at : at + count] = False
        most, end = _MOST_BUFFERS // of_row, at + count
        for row in range(at, end, most):
            part = buffers[(row - at) * of_row : (min(row + most, end) - at) * of_row]
            whole = os.preadv(descriptor, part, offset + (row - at) * stride) // stride
            words = self._headers[row : row + whole].view(np.int64)[:, self._checked]
            self.sound[row : row + whole] = (words == self._expected).all(axis=1)

    def keys(self, rows: np.ndarray) -> list[str]:
        """The keys of some rows."""
        names = self._headers[rows, :100].view("S100")[:, 0].tolist()
        return [name.partition(b".")[0].decode("latin1") for name in names]


class ShardReader:
    """The samples of one tar, by number, for any number of threads. The file is closed with the last reference.

    record, members: what the manifest promises; `name` is for errors. SampleError if it is no tar at all.
    """

    def __init__(self, file: BinaryIO, name: str, record: ShardRecord, members: Mapping[str, MemberSpec]) -> None:
        self._file, self._descriptor = file, file.fileno()
        self.close = weakref.finalize(self, file.close)
        """Close the file."""
        self._stride, size = row_bytes(record, members), os.fstat(self._descriptor).st_size
        self._spans: list[tuple[int, int]] = []
        """Where the samples are, first byte and end, of a tar that is no array of rows."""
        whole = min(record.num_samples, size // (self._stride or sys.maxsize))  # less if it is truncated
        probes = sorted({(whole - 1) * i // _PROBES for i in range(_PROBES + 1)} if whole else ())
        sound = 0
        if probes:
            probe = Rows(members, members, self._stride, 1, len(probes))
            for at, row in enumerate(probes):
                probe.read(self._descriptor, row * self._stride, self._stride, at, 1)
            sound = int(probe.sound.sum())
        if sound < max(1, len(probes) * (0.5 if size == record.bytes else 1.0)):
            self._stride, self._spans = 0, self._walk(name)

    def rows(self, first: int, count: int, into: Rows, at: int) -> None:
        """Read `count` rows from number `first` on into those of `into` from `at` on. OSError if the file cannot be read."""
        into.sound[at : at + count] = False
        if self._stride:
            into.read(self._descriptor, first * self._stride, self._stride, at, count)

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
