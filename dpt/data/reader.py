"""Read shards: any sample of a tar by its number, without parsing where all samples have our writer's layout.

The manifest gives the length of such a sample and the positions of its arrays: the shard is an array of rows. Neighbouring rows
are read at once, and their headers are only compared with the expected ones. Other tars are walked once and
read sample by sample. Reads, not memory maps: a file that shrinks is then an error naming the sample, not a dead process.
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
"""A tar's block size: headers take one block, members are padded to whole ones."""
END = bytes(2 * BLOCK)
_PROBES = 4


class SampleError(Exception):
    """A sample (or a whole shard) that cannot be read; the text says why."""


@lru_cache(maxsize=256)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of a version 1.0 .npy file in C order; `dtype`: its numpy name."""
    buffer = io.BytesIO()
    descr = np.dtype(dtype).newbyteorder("<").str
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _array_bytes(spec: MemberSpec) -> int:
    return np.dtype(spec.dtype).itemsize * math.prod(max(side, 0) for side in spec.shape)


def _member_bytes(spec: MemberSpec) -> int:
    """Bytes of a tar's header and the .npy file, padded."""
    return BLOCK + -(-(len(npy_header(spec.dtype, spec.shape)) + _array_bytes(spec)) // BLOCK) * BLOCK


class Rows:
    """Memory for `slots` blocks of `size` samples each; reused forever, as fresh pages cost as much as filling them.

    A row holds a tar's sample up to the end of its last `wanted` member; `members`: all members of a sample.
    """

    def __init__(self, members: Mapping[str, MemberSpec], wanted: Collection[str], size: int, slots: int) -> None:
        self.size, self.free = size, list(range(0, slots * size, size))[::-1]
        """Rows per block, and the first row of each unused slot."""
        self.keys = np.empty(slots * size, object)
        self.arrays: dict[str, np.ndarray] = {}
        """The wanted members, `[slots * size, ...]`."""
        names = [name for name in MEMBER_ORDER if name in members]
        ends = np.cumsum([_member_bytes(members[name]) for name in names]).tolist()
        kept = max((end for name, end in zip(names, ends, strict=True) if name in wanted), default=0)
        self._memory = np.empty((slots * size, kept), np.uint8)
        checked, expected = [], []
        for name, start in zip(names, [0, *ends], strict=False):
            if name in wanted:
                spec, info = members[name], tarfile.TarInfo(name)
                npy, length = npy_header(spec.dtype, spec.shape), _array_bytes(spec)
                info.size = len(npy) + length
                header = info.tobuf(tarfile.USTAR_FORMAT) + npy
                # In 8-byte words: the low digits of the size and the magic of the tar's header, and all of the array's.
                words = [16, 32, *range(BLOCK // 8, len(header) // 8)]
                checked += [start // 8 + word for word in words]
                expected += np.frombuffer(header, np.int64)[words].tolist()
                values = self._memory[:, start + len(header) : start + len(header) + length].view(spec.dtype)
                self.arrays[name] = values.reshape(-1, *spec.shape)
        self._checked, self._expected = np.array(checked), np.array(expected)

    def read(self, descriptor: int, offset: int, stride: int, at: int, count: int) -> np.ndarray:
        """Read `count` rows of a file, `stride` bytes each from byte `offset` on, into the rows from number `at` on.

        Returns bool `[count]`: which are complete and have the expected headers.
        """
        kept = self._memory.shape[1]
        whole_memory, rest = self._memory.reshape(-1).data, memoryview(bytearray(stride - kept))
        parts = [part for row in range(at, at + count) for part in (whole_memory[row * kept : (row + 1) * kept], rest)]
        whole = os.preadv(descriptor, parts, offset) // stride
        rows = self._memory[at : at + whole]
        start = 8 * (int(self._checked[0]) - 16)  # start of a tar header, which begins with the sample's key
        names = rows[:, start : start + 100].tobytes().decode("latin1")
        self.keys[at : at + whole] = [names[i : i + 100].partition(".")[0] for i in range(0, len(names), 100)]
        sound = np.zeros(count, bool)
        sound[:whole] = (rows.view(np.int64)[:, self._checked] == self._expected).all(axis=1)
        return sound

    def put(self, at: int, sample: Mapping[str, Any]) -> None:
        """Put a parsed sample into row `at`. SampleError if one of its members contradicts the manifest."""
        for name, values in self.arrays.items():
            array = sample[name]
            if (array.dtype, array.shape) != (values.dtype, values.shape[1:]):
                raise SampleError(f"its {name} is {array.dtype} {list(array.shape)}, not as in the manifest")
            values[at] = array
        self.keys[at] = sample["key"]


class ShardReader:
    """The samples of one tar, by number, for any number of threads. The file closes with the last reference.

    record, members: from the manifest; `name` is for errors. SampleError if it is not a tar at all.
    """

    def __init__(self, file: BinaryIO, name: str, record: ShardRecord, members: Mapping[str, MemberSpec]) -> None:
        self._file, self._descriptor = file, file.fileno()
        self.close = weakref.finalize(self, file.close)
        """Close the file."""
        self._stride = self._row_bytes(record, members)
        self._spans = [] if self._stride else self._walk(name)
        """Positions (first byte, end) of the samples in a tar that is not an array of rows."""

    def read(self, first: int, count: int, rows: Rows, at: int) -> dict[int, str]:
        """Read `count` samples from number `first` on into `rows` from row `at` on: at once, and any unexpected ones
        by parsing. Returns the reason for each unreadable one, by number. OSError if the file cannot be read."""
        sound, stride = np.zeros(count, bool), self._stride
        if stride:
            sound = rows.read(self._descriptor, first * stride, stride, at, count)
        errors: dict[int, str] = {}
        for number in np.flatnonzero(~sound).tolist():
            try:
                rows.put(at + number, self.sample(first + number, list(rows.arrays)))
            except SampleError as error:
                errors[first + number] = str(error)
        return errors

    def sample(self, row: int, members: Sequence[str] | None = None) -> dict[str, Any]:
        """Return one sample: `key`, its arrays (`members` only, if given) and `meta` (dict). SampleError if damaged,
        OSError if the file cannot be read."""
        start, end = self._spans[row] if row < len(self._spans) else (row * self._stride, (row + 1) * self._stride)
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
        probe = Rows(members, members, 1, 1)
        sound = [probe.read(self._descriptor, row * stride, stride, 0, 1)[0] for row in probes]
        share = 0.5 if size == record.bytes else 1.0  # in a tar of the recorded size, some may be damaged
        return stride if sound and np.mean(sound) >= share else 0

    def _walk(self, name: str) -> list[tuple[int, int]]:
        """(first byte, end) of every complete sample in a tar whose samples differ."""
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
    """Split "a/b.latents.npy" into ("a/b", "latents.npy"): a key ends at the first dot of the last part (as in WebDataset)."""
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
