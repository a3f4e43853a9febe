"""Blocks of neighbouring samples in memory: read at once, given out one sample at a time, dropped when all are given."""

from collections.abc import Sequence

import numpy as np

from dpt.data.fetch import Patience, retry
from dpt.data.order import SetSize
from dpt.data.reader import RowFormat, row_keys
from dpt.data.store import ShardError, ShardStore

BlockPlace = tuple[int, int, int]
"""A block: number of its set, of its shard, of its first row."""


class Arena:
    """Room for blocks of rows of one format: for `blocks` of them at first, growing as needed.

    rest, large: the rows, taken apart as their format says.
    """

    def __init__(self, row_format: RowFormat, block: int, blocks: int) -> None:
        self.format, self._block = row_format, block
        self.rest = np.empty((0, row_format.rest_bytes), np.uint8)
        self.large = {member.name: np.empty((0, member.nbytes), np.uint8) for member in row_format.large}
        self._buffers: dict[int, list[memoryview]] = {}
        self._free: list[int] = []
        self._grow(blocks)

    def _grow(self, blocks: int) -> None:
        used, added = len(self.rest), blocks * self._block

        def larger(array: np.ndarray) -> np.ndarray:
            added_rows = np.empty((added, *array.shape[1:]), array.dtype)
            return np.concatenate([array, added_rows]) if used else added_rows

        self.rest = larger(self.rest)
        self.large = {name: larger(array) for name, array in self.large.items()}
        self._buffers.clear()
        self._free = list(range(used, used + added, self._block))[::-1]

    def take(self) -> int:
        """First row of an unused block."""
        if not self._free:
            self._grow(len(self.rest) // self._block)
        return self._free.pop()

    def give_back(self, first: int) -> None:
        """The block that begins at row `first` is not needed any more."""
        self._free.append(first)

    def buffers(self, first: int, count: int) -> list[memoryview]:
        """What a read of `count` rows into the block at row `first` fills."""
        if first not in self._buffers:
            rows = slice(first, first + self._block)
            self._buffers[first] = self.format.buffers(self.rest[rows], {name: a[rows] for name, a in self.large.items()})
        found = self._buffers[first]
        return found[: count * (len(found) // self._block)]

    def gather(
        self, rows: np.ndarray, arrays: dict[str, np.ndarray], slots: np.ndarray, whole: bool
    ) -> tuple[list[str], np.ndarray]:
        """Copy the members of `rows` into `slots` of `arrays`; `whole`: into all, and all members have the arrays' shape.

        Members shorter than the arrays' are filled up with zeros, missing ones are zeros. Returns the keys, and bool `[N]`:
        whether the rows are sound.
        """
        rest = self.rest[:, : self.format.used_bytes][rows]
        own = {member.name: member for member in self.format.members}
        for name, array in arrays.items():
            if name not in own:
                array[slots] = 0
                continue
            member = own[name]
            if name in self.large and whole:
                out = array.reshape(len(rows), -1).view(np.uint8)
                np.take(self.large[name], rows, axis=0, out=out, mode="clip")  # "raise" would copy twice
                continue
            at = self.format.rest_at(member.data)
            raw = self.large[name][rows] if name in self.large else np.ascontiguousarray(rest[:, at : at + member.nbytes])
            values = raw.view(member.dtype).reshape(len(rows), *member.shape)
            if whole:
                array[:] = values
            else:
                array[slots] = 0
                array[(slots, slice(0, member.shape[0])) if member.shape else slots] = values
        return row_keys(rest), self.format.sound(rest)


class Blocks:
    """The loaded blocks of several sets. `expected`: how many are about needed at a time."""

    def __init__(self, store: ShardStore, sizes: Sequence[SetSize], patience: Patience, expected: int) -> None:
        self._store, self._patience, self._sizes, self._expected = store, patience, sizes, expected
        self.arenas: list[Arena] = []
        self._loaded: dict[BlockPlace, tuple[int, int]] = {}
        self._unused: dict[BlockPlace, int] = {}
        """Of each loaded block: samples not given out yet."""
        self._used: dict[BlockPlace, int] = {}
        """Of each loaded block: when it was last used."""

    def load(self, place: BlockPlace) -> tuple[int, int]:
        """Where the block is: number of its arena, first row there. (-1, 0): its samples must be read one by one."""
        if place not in self._loaded:
            self._loaded[place] = self._load(*place)
            number, shard, first = place
            self._unused[place] = min(self._sizes[number].block, self._sizes[number].counts[shard] - first)
        return self._loaded[place]

    def use(self, place: BlockPlace, samples: int, when: int, again: bool) -> None:
        """So many samples of a block were given out; it is dropped once they all were, if it is not soon needed `again`."""
        self._unused[place] -= samples
        self._used[place] = when
        if self._unused[place] <= 0 and not again:
            self._drop(place)

    def drop_unused(self, since: int) -> None:
        """Drop the blocks not used since then: the rest of their samples is others' (ranks', lanes'), or far away."""
        for place in [place for place, when in self._used.items() if when < since]:
            self._drop(place)

    def _drop(self, place: BlockPlace) -> None:
        arena, start = self._loaded.pop(place)
        del self._unused[place], self._used[place]
        if arena >= 0:
            self.arenas[arena].give_back(start)

    def _load(self, number: int, shard: int, first: int) -> tuple[int, int]:
        try:
            row_format = self._store.get((number, shard)).row_format
        except ShardError:
            return -1, 0
        if row_format is None:
            return -1, 0
        size = self._sizes[number]
        which = next((i for i, arena in enumerate(self.arenas) if arena.format is row_format), len(self.arenas))
        if which == len(self.arenas):
            self.arenas.append(Arena(row_format, size.block, self._expected))
        arena, count = self.arenas[which], min(size.block, size.counts[shard] - first)
        start = arena.take()
        whole = self._read((number, shard), first, arena.buffers(start, count))
        arena.rest[start + whole : start + count] = 0  # not sound
        return which, start

    def _read(self, shard: tuple[int, int], first: int, buffers: list[memoryview]) -> int:
        """Rows read whole; after read errors on a newly opened file, 0 if they stay."""

        def again() -> int:
            return self._store.reopen(shard).reader.read_rows(first, buffers)

        try:
            return self._store.get(shard).reader.read_rows(first, buffers)
        except OSError:
            try:
                return int(retry(again, self._patience))
            except (OSError, ShardError):
                return 0
