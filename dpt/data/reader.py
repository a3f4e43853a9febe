"""Reading shards: any sample of a tar by its number, and without parsing where all samples are laid out as our writer does.

The manifest tells how long such a sample is, and where in it the arrays are: the shard is an array of rows. Neighbouring rows
are read at once, and of their headers it is only compared whether they are what they must be. Other tars are walked once and
read sample by sample. Reads, not memory maps: a file that shrinks is then an error that names the sample, not a dead process.
"""

import io
import json
import math
import os
import tarfile
import weakref
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

import numpy as np

from dpt.data.manifest import MEMBER_ORDER, MemberSpec, ShardRecord

BLOCK = 512
"""A tar's unit: headers are one block, members are padded to whole ones."""
END = bytes(2 * BLOCK)
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


def _array_bytes(spec: MemberSpec) -> int:
    return np.dtype(spec.dtype).itemsize * math.prod(max(side, 0) for side in spec.shape)


def _member_bytes(spec: MemberSpec) -> int:
    """Of a tar's header and the .npy file, padded."""
    return BLOCK + -(-(len(npy_header(spec.dtype, spec.shape)) + _array_bytes(spec)) // BLOCK) * BLOCK


class Rows:
    """Memory for `slots` blocks of `size` rows each; reused for ever, as fresh pages cost as much as filling them.

    A row is what a sample is in a tar, up to the end of the last of the `wanted` members; `members`: all that it has.
    """

    def __init__(self, members: Mapping[str, MemberSpec], wanted: Collection[str], size: int, slots: int) -> None:
        self.size, self.free = size, list(range(0, slots * size, size))[::-1]
        """Rows of a block, and the first row of each unused slot."""
        self.arrays: dict[str, np.ndarray] = {}
        """The wanted members, `[slots * size, ...]`."""
        self.sound = np.zeros(slots * size, bool)
        """Which rows came whole and have the headers that they must have."""
        starts: dict[str, int] = {}
        checked, expected, end, kept = [], [], 0, 0
        for name in (name for name in MEMBER_ORDER if name in members):
            spec, start = members[name], end
            end = start + _member_bytes(spec)
            if name in wanted:
                npy, info = npy_header(spec.dtype, spec.shape), tarfile.TarInfo(name)
                info.size = len(npy) + _array_bytes(spec)
                # In 8-byte words: the low digits of the size and the magic of the tar's header, and all of the array's.
                words = [16, 32, *range(BLOCK // 8, (BLOCK + len(npy)) // 8)]
                checked += [start // 8 + word for word in words]
                expected += np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT) + npy, np.int64)[words].tolist()
                if not starts:
                    self._name = start  # of the sample, in its first header
                starts[name], kept = start + BLOCK + len(npy), end
        self._checked, self._expected = np.array(checked), np.array(expected)
        self._memory = np.empty((slots * size, kept), np.uint8)
        self._parts: dict[tuple[int, int], list[memoryview]] = {}
        """Of a slot, by its first row and the bytes of a sample: where to read each row to, and the rest of its sample."""
        for name, start in starts.items():
            values = self._memory[:, start : start + _array_bytes(members[name])].view(members[name].dtype)
            self.arrays[name] = values.reshape(-1, *members[name].shape)

    def read(self, descriptor: int, offset: int, stride: int, at: int, count: int) -> None:
        """Read `count` rows of a file, `stride` bytes each from byte `offset` on, into the rows from number `at` on."""
        if (at, stride) not in self._parts:
            rest = memoryview(bytearray(stride - self._memory.shape[1]))
            self._parts[at, stride] = [part for row in self._memory[at : at + self.size] for part in (row.data, rest)]
        whole = os.preadv(descriptor, self._parts[at, stride][: 2 * count], offset) // stride
        words = self._memory[at : at + whole].view(np.int64)[:, self._checked]
        self.sound[at : at + count] = False
        self.sound[at : at + whole] = (words == self._expected).all(axis=1)

    def keys(self, rows: np.ndarray) -> list[str]:
        """The keys of some rows."""
        names = self._memory[rows, self._name : self._name + 100].tobytes().decode("latin1")
        return [names[at : at + 100].partition(".")[0] for at in range(0, len(names), 100)]


class ShardReader:
    """The samples of one tar, by number, for any number of threads. The file is closed with the last reference.

    record, members: what the manifest promises; `name` is for errors. SampleError if it is no tar at all.
    """

    def __init__(self, file: BinaryIO, name: str, record: ShardRecord, members: Mapping[str, MemberSpec]) -> None:
        self._file, self._descriptor = file, file.fileno()
        self.close = weakref.finalize(self, file.close)
        """Close the file."""
        self._stride = self._row_bytes(record, members)
        self._spans = [] if self._stride else self._walk(name)
        """Where the samples are, first byte and end, of a tar that is no array of rows."""

    def rows(self, first: int, count: int, into: Rows, at: int) -> None:
        """Read `count` rows from number `first` on into those of `into` from `at` on. OSError if the file cannot be read."""
        if self._stride:
            into.read(self._descriptor, first * self._stride, self._stride, at, count)
        else:
            into.sound[at : at + count] = False

    def sample(self, row: int, members: Sequence[str] | None = None) -> dict[str, Any]:
        """One sample: `key`, its arrays and `meta` (dict); of the arrays only `members` if given. SampleError if damaged,
        OSError if the file cannot be read."""
        start, end = row * self._stride, (row + 1) * self._stride
        if not self._stride and row < len(self._spans):
            start, end = self._spans[row]
        content = os.pread(self._descriptor, end - start, start)
        if not content or len(content) < end - start:
            raise SampleError("the tar is truncated")
        return _parse_sample(content, members)

    def _row_bytes(self, record: ShardRecord, members: Mapping[str, MemberSpec]) -> int:
        """Bytes from one sample to the next if the tar is an array of rows, else 0."""
        stride, rest = divmod(record.bytes - len(END), record.num_samples)
        least = sum(_member_bytes(spec) for spec in members.values())
        if rest or stride % BLOCK or stride < least or any(-1 in spec.shape for spec in members.values()):
            return 0
        size = os.fstat(self._descriptor).st_size
        whole = min(record.num_samples, size // stride)  # less if it is truncated
        probes = sorted({(whole - 1) * i // _PROBES for i in range(_PROBES + 1)} if whole else ())
        probe = Rows(members, members, 1, len(probes))
        for at, row in enumerate(probes):
            probe.read(self._descriptor, row * stride, stride, at, 1)
        share = 0.5 if size == record.bytes else 1.0  # of a tar as written, some may be damaged
        return stride if probes and probe.sound.mean() >= share else 0

    def _walk(self, name: str) -> list[tuple[int, int]]:
        """(first byte, end) of every complete sample of a tar whose samples differ."""
        found: list[tuple[str, str, int, int]] = []
        size = os.fstat(self._descriptor).st_size
        try:
            self._file.seek(0)
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                for info in tar:
                    end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                    if info.isfile() and end <= size:
                        found.append((*_split_name(info.name), info.offset, end))
        except (tarfile.TarError, OSError) as error:
            if not found:
                raise SampleError(f"{name} is no readable tar ({error})") from error
        samples = [list(members) for _, members in groupby(found, key=itemgetter(0))]
        if samples and [member[1] for member in samples[-1]] != [member[1] for member in samples[0]]:
            samples.pop()  # cut off after some of its members
        return [(members[0][2], members[-1][3]) for members in samples]


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
