"""Filling batches: global positions in, members out; unreadable samples are replaced, named and counted.

One thread plans and fills batches. Others open (or fetch) the shards that it will need, and read their blocks ahead of it.
"""

import itertools
import logging
import resource
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch

from dpt.data.blocks import Block, Shard, ShardError, Workers, naming
from dpt.data.manifest import Manifest, MemberSpec
from dpt.data.order import MixtureOrder, SetSize
from dpt.data.reader import MEMBER_ORDER, Rows, SampleError, row_bytes
from dpt.data.sources import Patience, ShardSet, is_url
from dpt.errors import UserError

log = logging.getLogger("dpt.data")

Batch = dict[str, Any]
Place = tuple[int, int, int]
"""A sample: number of its set, of its shard, of its row."""

_EVALUATION_MEMBERS = ("image", "truth", "code_mask")
_BLOCK_BYTES = 1 << 20
_LARGEST_BLOCK = 64
_OPEN_FILES = 16384
"""What the limit of open files is raised to, if it may be."""
_PLANNED_SAMPLES = 1024
"""Samples located at a time."""
_FETCHED_SAMPLES = 16384
"""How far ahead of need shards behind URLs are fetched, at most."""


def set_size(manifest: Manifest) -> SetSize:
    """What the stream's order depends on. A block is about a megabyte: long reads from disks, little memory."""
    row_bytes = sum(shard.bytes for shard in manifest.shards) // manifest.num_samples
    block = max(1, min(_LARGEST_BLOCK, _BLOCK_BYTES // max(row_bytes, 1)))
    return SetSize(counts=tuple(shard.num_samples for shard in manifest.shards), block=block)


def choose_members(sets: Sequence[ShardSet], wanted: Collection[str] | None) -> dict[str, MemberSpec]:
    """The members of a batch and their specs: `wanted`, or all but the evaluation's.

    Sets may differ in which members they have and in the length of a member's first axis (number of targets): the batch has
    the largest, filled up with zeros. UserError if they differ otherwise, or if no set has a wanted member.
    """
    chosen = set(MEMBER_ORDER) - set(_EVALUATION_MEMBERS) if wanted is None else set(wanted)
    specs: dict[str, MemberSpec] = {}
    for source in sets:
        for name in (name for name in MEMBER_ORDER if name in chosen and name in source.manifest.members):
            spec = source.manifest.members[name]
            if -1 in spec.shape:
                raise UserError(f"{source.name}: {name} differs in size between samples; encode training sets to one size.")
            other = specs.setdefault(name, spec)
            if (other.dtype, other.shape[1:], len(other.shape)) != (spec.dtype, spec.shape[1:], len(spec.shape)):
                raise UserError(
                    f"{source.name}: {name} is {spec.dtype} {list(spec.shape)} but {other.dtype} {list(other.shape)} in "
                    f"{sets[0].name}; encode both sets alike."
                )
            if spec.shape > other.shape:
                specs[name] = spec
    if missing := sorted(set(wanted or ()) - set(specs)):
        raise UserError(f"{sets[0].name}: the shards hold no {missing[0]}; encode the set with it.")
    return specs


class Plan(NamedTuple):
    """A batch to be filled: what stands at its `positions`, int64 `[B]`, the places of its blocks, and its shards."""

    positions: np.ndarray
    sets: np.ndarray
    shards: np.ndarray
    rows: np.ndarray
    places: list[Place]
    opened: list[Shard]
    blocks: list[Block]
    """`[B]`, once they are being read: a plan far ahead must not keep those of an earlier batch."""


@dataclass(kw_only=True, eq=False)
class BatchReader:
    """Reads samples into batches. A lane of a set goes through its blocks one after the other, and keeps the one it is in."""

    sets: Sequence[ShardSet]
    order: MixtureOrder
    specs: dict[str, MemberSpec]
    positions: Callable[[int], np.ndarray]
    """Batch number -> global positions of its samples, int64 `[B]`."""
    share: int
    """One of so many samples of the stream is this reader's."""
    threads: int
    """Threads that read, and as many that open or fetch (at least one); 0: the caller's reads."""
    ahead: int
    """Batches whose blocks are read ahead."""
    bad: dict[Place, str]
    """The unreadable samples met so far, with the reason."""
    max_bad_samples: int
    pin_memory: bool
    patience: Patience
    cache_dir: str

    def __post_init__(self) -> None:
        self._blocks_read = np.array([set_size(found.manifest).block for found in self.sets])
        needed = (self.ahead + 1) * len(self.positions(0)) + self.order.lanes  # at worst a block for each sample
        self._rows = [_memory(found.manifest, self.specs, needed, self.threads) for found in self.sets]
        self._openers, self._readers = Workers(max(1, self.threads), "data open"), Workers(self.threads, "data read")
        self._shards: WeakValueDictionary[tuple[int, int], Shard] = WeakValueDictionary()
        self._blocks: WeakValueDictionary[Place, Block] = WeakValueDictionary()
        """By the place of their first row. Those that a batch read ahead needs, or a lane is in, are alive."""
        self._lanes: dict[int, Block] = {}
        self._substitutes: dict[int, Shard] = {}
        """The shard that a set's last sample in place of an unreadable one is from."""
        self._most_open = _most_open_shards()

    def batches(self, first: int) -> Generator[Batch]:
        """Batches from number `first` on, without end."""
        plans: deque[Plan] = deque()
        planned, begun, size = first, first, len(self.positions(first))
        chunk, fetched = max(1, _PLANNED_SAMPLES // size), self._fetched_samples() // size
        try:
            for number in itertools.count(first):
                while planned <= number + self.ahead or (
                    planned <= number + fetched and len(self._shards) < self._most_open // 2
                ):
                    plans += self._plan(np.stack([self.positions(planned + i) for i in range(chunk)]))
                    planned += chunk
                for plan in itertools.islice(plans, begun - number, self.ahead + 1):
                    self._begin(plan)
                begun = number + self.ahead + 1
                yield self._fill(plans.popleft())
        finally:
            self.patience.stop.set()
            self._openers.close()
            self._readers.close()

    def _fetched_samples(self) -> int:
        """How far ahead shards are fetched: as long as a lane takes to go through one."""
        lengths = [
            source.manifest.num_samples / len(source.urls) * self.order.lanes * self.order.period / part / self.share
            for source, part in zip(self.sets, self.order.shares, strict=True)
            if is_url(source.urls[0])
        ]
        return int(min(_FETCHED_SAMPLES, *lengths)) if lengths else 0

    def _plan(self, positions: np.ndarray) -> Iterator[Plan]:
        """Some batches, `positions` `[N, B]`. Their shards are being opened from now on."""
        sets, shards, rows = (found.reshape(positions.shape) for found in self.order.locate(positions.reshape(-1)))
        firsts = rows - rows % self._blocks_read[sets]
        places = [list(zip(*found, strict=True)) for found in zip(sets.tolist(), shards.tolist(), firsts.tolist(), strict=True)]
        for number, of_batch in enumerate(places):
            opened = [self._shard(*place) for place in dict.fromkeys(place[:2] for place in of_batch)]
            yield Plan(positions[number], sets[number], shards[number], rows[number], of_batch, opened, [])

    def _begin(self, plan: Plan) -> None:
        """Have the batch's blocks read."""
        blocks = {place: self._block(place) for place in dict.fromkeys(plan.places)}
        plan.blocks.extend(blocks[place] for place in plan.places)
        for block in blocks.values():
            block.begin(self._readers)

    def _block(self, place: Place) -> Block:
        number, shard, first = place
        if (block := self._blocks.get(place)) is None:
            block = self._blocks[place] = Block(self._shard(number, shard), first, self._rows[number])
        return block

    def _shard(self, number: int, shard_number: int) -> Shard:
        if (shard := self._shards.get((number, shard_number))) is None:
            if len(self._shards) >= self._most_open:
                raise UserError(
                    f"{self.sets[number].name}: more than {self._most_open} shards must be open at once, which takes too many "
                    "files for one process; raise the limit (ulimit -n) or encode into larger shards."
                )
            shard = Shard(self.sets[number], shard_number, self._openers, self.patience, self.cache_dir)
            self._shards[number, shard_number] = shard
        return shard

    def _fill(self, plan: Plan) -> Batch:
        batch = {
            name: torch.empty((len(plan.blocks), *spec.shape), dtype=getattr(torch, spec.dtype), pin_memory=self.pin_memory)
            for name, spec in self.specs.items()
        }
        for block in dict.fromkeys(plan.blocks):
            block.wait()
        lanes = plan.sets * self.order.lanes + plan.positions % self.order.lanes
        self._lanes.update(zip(lanes.tolist(), plan.blocks, strict=True))
        rows = plan.rows + np.array([block.at - block.first for block in plan.blocks])
        keys = np.empty(len(rows), object)
        for number in np.unique(plan.sets).tolist():
            slots, own = np.flatnonzero(plan.sets == number), self._rows[number]
            mine = rows[slots]
            for name, tensor in batch.items():
                _put(tensor.numpy(), slots, own.arrays.get(name), mine)
            keys[slots] = own.keys(mine)
            for slot in slots[~own.sound[mine]].tolist():
                keys[slot] = self._read_or_replace((number, int(plan.shards[slot]), int(plan.rows[slot])), slot, batch)
        index, source = torch.from_numpy(plan.positions.copy()), torch.from_numpy(plan.sets.copy())
        return {**batch, "sample_index": index, "source": source, "key": keys.tolist()}

    def _read_or_replace(self, place: Place, slot: int, batch: Batch) -> str:
        """Read one sample, or if it is unreadable the next readable one of its set: later rows, then later shards."""
        number, shard, row = place
        source = self.sets[number]
        for _ in range(source.manifest.num_samples):
            try:
                return self._read_alone((number, shard, row), slot, batch)
            except SampleError as error:
                reason = str(error)
                self._note((number, shard, row), reason)
                row += 1
                if isinstance(error, ShardError) or row == source.manifest.shards[shard].num_samples:
                    shard, row = (shard + 1) % len(source.urls), 0
        raise UserError(f"{source.name}: no sample can be read ({reason}); encode the set anew.")

    def _read_alone(self, place: Place, slot: int, batch: Batch) -> str:
        """Read one sample by parsing it. Returns its key."""
        number, shard_number, row = place
        own = self._rows[number].arrays
        shard = self._substitutes[number] = self._shard(number, shard_number)
        with naming(f"sample {row} of {shard.url}"):
            try:
                sample = shard.read(lambda reader: reader.sample(row, list(own)))
            except OSError as error:
                raise SampleError(error.strerror or str(error)) from error
        for name, array in own.items():
            if (sample[name].dtype, sample[name].shape) != (array.dtype, array.shape[1:]):
                raise SampleError(f"its {name} is {sample[name].dtype} {list(sample[name].shape)}, not as in the manifest")
        for name, tensor in batch.items():
            _put(tensor.numpy(), np.array([slot]), sample[name][None] if name in own else None, np.array([0]))
        return str(sample["key"])

    def _note(self, place: Place, reason: str) -> None:
        if place in self.bad:
            return
        self.bad[place] = f"sample {place[2]} of {self.sets[place[0]].urls[place[1]]}: {reason}"
        log.warning("unreadable: %s; another sample takes its place", self.bad[place])
        if len(self.bad) > self.max_bad_samples:
            raise UserError(
                f"{self.bad[place]}; unreadable samples: {len(self.bad)}, dpt.data.max_bad_samples: {self.max_bad_samples}; "
                "encode the set anew or raise the field."
            )


def _memory(manifest: Manifest, specs: Collection[str], needed: int, threads: int) -> Rows:
    """Room for `needed` blocks of a set, or all that it has, and for those that threads let go of a moment later."""
    size = set_size(manifest)
    slots = min(needed, sum(-(-count // size.block) for count in size.counts)) + threads
    stride = max(row_bytes(record, manifest.members) for record in manifest.shards)
    wanted = [name for name in specs if name in manifest.members]
    return Rows(manifest.members, wanted, stride, size.block, slots)


def _most_open_shards() -> int:
    """How many shards may be open at once: most of the files that this process may open, once its soft limit is raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= limit:
        limit = _OPEN_FILES if soft == resource.RLIM_INFINITY else soft
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit * 3 // 4


def _put(array: np.ndarray, slots: np.ndarray, values: np.ndarray | None, chosen: np.ndarray) -> None:
    """Put the `chosen` ones of a member's `values` into `slots` of a batch, filled up with zeros; all zeros if it has none."""
    if values is None:
        array[slots] = 0
    elif values.shape[1:] != array.shape[1:]:
        array[slots] = 0
        array[slots, : values.shape[1]] = values[chosen]
    elif len(slots) == len(array):
        np.take(values, chosen, axis=0, out=array, mode="clip")  # "raise" would copy twice
    else:
        array[slots] = values[chosen]
