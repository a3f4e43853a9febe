"""Filling batches: places of samples in, members out; unreadable samples are replaced, named and counted.

One thread plans and fills batches. Others open (or fetch) the shards that it will need, and read their blocks ahead of it.
"""

import atexit
import logging
import resource
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from dpt.data.blocks import Block, Shard, ShardError, Workers
from dpt.data.manifest import MemberSpec
from dpt.data.order import SetSize
from dpt.data.reader import Rows, SampleError
from dpt.data.sources import Patience, ShardSet
from dpt.errors import UserError

log = logging.getLogger("dpt.data")

Batch = dict[str, Any]
Place = tuple[int, int, int]
"""A sample: number of its set, of its shard, of its row."""

_OPENED_AHEAD = 65536
"""The shards of so many of the stream's next samples are opened, or fetched."""
_OPEN_FILES = 16384
"""What the limit of open files is raised to, if it may be."""


class Plan(NamedTuple):
    """A batch to be filled: what stands at its `positions` in the stream; int64 `[B]` each."""

    positions: np.ndarray
    sets: np.ndarray
    shards: np.ndarray
    rows: np.ndarray
    opened: list[Shard]
    """Its shards, from when it is planned."""
    blocks: list[Block]
    """`[B]`, from when they are being read: a plan far ahead must not keep those of an earlier batch."""


@dataclass(kw_only=True, eq=False)
class BatchReader:
    """Reads samples into batches. A lane of a set goes through its blocks one after the other, and keeps the one it is in."""

    places: Iterator[Sequence[np.ndarray]]
    """Of one batch after the other: positions in the stream, sets, shards and rows of its samples, int64 `[B]` each."""
    batch_size: int
    sets: Sequence[ShardSet]
    sizes: Sequence[SetSize]
    lanes: int
    """Of each set."""
    specs: Mapping[str, MemberSpec]
    """The members of a batch."""
    threads: int
    """Threads that read, and as many that open or fetch (at least one); 0: the one that fills batches reads."""
    ahead: int
    """Batches that are filled ahead, and as many more whose blocks are read ahead."""
    bad: dict[Place, str]
    """The unreadable samples met so far, with the reason."""
    max_bad_samples: int
    pin_memory: bool
    patience: Patience
    cache_dir: str
    verify: bool
    """Whether shards are hashed before their first samples are read."""

    def __post_init__(self) -> None:
        self.patience = replace(self.patience, stop=threading.Event())
        self._memory = [self._room(source, size) for source, size in zip(self.sets, self.sizes, strict=True)]
        self._block_sizes = np.array([size.block for size in self.sizes])
        self._openers, self._readers = Workers(max(1, self.threads), "data open"), Workers(self.threads, "data read")
        self._filler = Workers(1, "data fill")
        self._most_open = _most_open_shards()
        self._open_ahead = min(self._most_open // 2, sum(len(source.urls) for source in self.sets))
        self._shards: WeakValueDictionary[tuple[int, int], Shard] = WeakValueDictionary()
        self._blocks: WeakValueDictionary[Place, Block] = WeakValueDictionary()
        """By the place of their first row. Those that a plan needs, or a lane is in, are alive."""
        self._lanes: dict[int, Block] = {}
        """The block that each lane of each set is in."""
        self._substitutes: dict[int, Shard] = {}
        """The shard that a set's last sample in place of an unreadable one is from."""
        self._plans: deque[Plan] = deque()

    def _room(self, source: ShardSet, size: SetSize) -> Rows:
        """Memory for the blocks of a set that may be needed at once, and for those that threads let go of a moment later."""
        needed = (self.ahead + 1) * self.batch_size + self.lanes  # at worst one for each sample
        slots = min(needed, sum(-(-count // size.block) for count in size.counts)) + self.threads
        return Rows(source.manifest.members, self.specs, size.block, slots)

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end."""
        atexit.register(self.close)  # a thread at work while the interpreter is taken apart ends in an abort
        filled = deque(self._filler.submit(self._next) for _ in range(self.ahead))
        try:
            while True:
                batch = filled.popleft().result()
                filled.append(self._filler.submit(self._next))
                yield batch
        finally:
            atexit.unregister(self.close)
            self.close()

    def close(self) -> None:
        """End the threads; fetches are given up."""
        self.patience.stop.set()
        for workers in (self._filler, self._openers, self._readers):
            workers.close()

    def _next(self) -> Batch:
        plans = self._plans
        while len(plans) <= self.ahead or (
            len(self._shards) < self._open_ahead and plans[-1].positions[0] < plans[0].positions[0] + _OPENED_AHEAD
        ):
            positions, sets, shards, rows = next(self.places)
            wanted = dict.fromkeys(zip(sets.tolist(), shards.tolist(), strict=True))
            plans.append(Plan(positions, sets, shards, rows, [self._shard(*shard) for shard in wanted], []))
        for plan in islice(plans, self.ahead + 1):
            if not plan.blocks:
                self._begin(plan)
        return self._fill(plans.popleft())

    def _begin(self, plan: Plan) -> None:
        """Have the batch's blocks read."""
        firsts = plan.rows - plan.rows % self._block_sizes[plan.sets]
        places = list(zip(plan.sets.tolist(), plan.shards.tolist(), firsts.tolist(), strict=True))
        blocks = {place: self._block(place) for place in dict.fromkeys(places)}
        plan.blocks[:] = [blocks[place] for place in places]
        lanes = plan.sets * self.lanes + plan.positions % self.lanes
        self._lanes.update(zip(lanes.tolist(), plan.blocks, strict=True))

    def _block(self, place: Place) -> Block:
        if (block := self._blocks.get(place)) is None:
            number, shard, first = place
            block = self._blocks[place] = Block(self._shard(number, shard), first, self._memory[number], self._readers)
        return block

    def _shard(self, number: int, shard_number: int) -> Shard:
        if (shard := self._shards.get((number, shard_number))) is None:
            if len(self._shards) >= self._most_open:
                raise UserError(
                    f"{self.sets[number].name}: more than {self._most_open} shards must be open at once, which takes too many "
                    "files for one process; raise the limit (ulimit -n) or encode into larger shards."
                )
            shard = Shard(self.sets[number], shard_number, self._openers, self.patience, self.cache_dir, verify=self.verify)
            self._shards[number, shard_number] = shard
        return shard

    def _fill(self, plan: Plan) -> Batch:
        batch: Batch = {
            name: torch.empty((len(plan.blocks), *spec.shape), dtype=getattr(torch, spec.dtype), pin_memory=self.pin_memory)
            for name, spec in self.specs.items()
        }
        for tensor in batch.values() if len(self.sets) > 1 else ():
            tensor.zero_()  # what a set lacks
        for block in dict.fromkeys(plan.blocks):
            block.wait()
        at = plan.rows + np.array([block.at - block.first for block in plan.blocks])
        keys = np.empty(len(at), object)
        for number in np.unique(plan.sets).tolist():
            slots, memory = np.flatnonzero(plan.sets == number), self._memory[number]
            rows = at[slots]
            for name, values in memory.arrays.items():
                _put(batch[name], slots, values, rows)
            keys[slots] = memory.keys(rows)
            for slot in slots[~memory.sound[rows]].tolist():
                keys[slot] = self._read_or_replace(batch, slot, (number, int(plan.shards[slot]), int(plan.rows[slot])))
        index, source = torch.from_numpy(plan.positions), torch.from_numpy(plan.sets)
        return {**batch, "sample_index": index, "source": source, "key": keys.tolist()}

    def _read_or_replace(self, batch: Batch, slot: int, place: Place) -> str:
        """Read one sample, or if it is unreadable the next readable one of its set: later rows, then later shards. Its key."""
        number, shard, row = place
        source = self.sets[number]
        for _ in range(source.manifest.num_samples):
            try:
                return self._read_alone(batch, slot, (number, shard, row))
            except SampleError as error:
                reason = f"sample {row} of {source.urls[shard]}: {error}"
                if (number, shard, row) not in self.bad:
                    self.bad[number, shard, row] = reason
                    log.warning("unreadable: %s; another sample takes its place", reason)
                if len(self.bad) > self.max_bad_samples:
                    raise UserError(
                        f"{reason}; unreadable samples: {len(self.bad)}, dpt.data.max_bad_samples: {self.max_bad_samples}; "
                        "encode the set anew or raise the field."
                    ) from error
                row += 1
                if isinstance(error, ShardError) or row == source.manifest.shards[shard].num_samples:
                    shard, row = (shard + 1) % len(source.urls), 0
        raise UserError(f"{reason}; no sample of {source.name} can be read; encode the set anew.")

    def _read_alone(self, batch: Batch, slot: int, place: Place) -> str:
        """Read one sample by parsing it. Returns its key."""
        number, shard_number, row = place
        arrays = self._memory[number].arrays
        shard = self._substitutes[number] = self._shard(number, shard_number)
        sample = shard.read(row, 1, lambda reader: reader.sample(row, list(arrays)))
        for name, array in arrays.items():
            if (sample[name].dtype, sample[name].shape) != (array.dtype, array.shape[1:]):
                raise SampleError(f"its {name} is {sample[name].dtype} {list(sample[name].shape)}, not as in the manifest")
        for name in arrays:
            _put(batch[name], np.array([slot]), sample[name][None], np.array([0]))
        return str(sample["key"])


def _most_open_shards() -> int:
    """How many shards may be open at once: most of the files that this process may open, once its soft limit is raised."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < min(hard, _OPEN_FILES):
        soft = min(hard, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    return soft * 3 // 4


def _put(tensor: Tensor, slots: np.ndarray, values: np.ndarray, chosen: np.ndarray) -> None:
    """Put the `chosen` ones of a member's `values` into `slots` of a batch, whose member may have more (targets)."""
    if values.shape[1:] != tensor.shape[1:]:
        tensor.numpy()[slots, : values.shape[1]] = values[chosen]
    elif len(slots) < len(tensor):
        tensor.numpy()[slots] = values[chosen]
    else:
        torch.index_select(torch.from_numpy(values), 0, torch.from_numpy(chosen), out=tensor)
