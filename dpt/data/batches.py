"""Filling batches: global positions in, members out; unreadable samples are replaced, named and counted.

One thread plans and fills batches. Others open (or fetch) the shards that it will need, and read their blocks ahead of it.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch

from dpt.data.fetch import Patience, Stopped, is_url
from dpt.data.manifest import Manifest, MemberSpec
from dpt.data.order import MixtureOrder, SetSize
from dpt.data.reader import MEMBER_ORDER, Rows, SampleError, ShardReader
from dpt.data.sources import ShardSet, open_shard
from dpt.data.threads import Workers
from dpt.errors import UserError

log = logging.getLogger("dpt.data")

T = TypeVar("T")
Batch = dict[str, Any]
Place = tuple[int, int, int]
"""A sample: number of its set, of its shard, of its row."""

_EVALUATION_MEMBERS = ("image", "truth", "code_mask")
_BLOCK_BYTES = 1 << 20
_LARGEST_BLOCK = 64
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


class ShardError(SampleError):
    """A shard that cannot be opened at all."""


class Shard:
    """A shard that one thread opens (or fetches) and others read. It is closed once nothing refers to it."""

    def __init__(self, source: ShardSet, number: int, openers: Workers, patience: Patience, cache_dir: str) -> None:
        self.url, self.num_samples = source.urls[number], source.manifest.shards[number].num_samples
        self._patience = patience
        self._open = partial(openers.submit, patience.retry, partial(open_shard, source, number, patience, cache_dir))
        self._opened: Future[ShardReader] = self._open()

    def read(self, action: Callable[[ShardReader], T]) -> T:
        """`action(reader)`, after an OSError again on a newly opened file. ShardError if it cannot be opened."""
        try:
            return action(self._reader())
        except OSError:
            return self._patience.retry(lambda: action(self._reader(anew=True)))

    def _reader(self, anew: bool = False) -> ShardReader:
        if anew:
            self._opened = self._open()
        try:
            return self._opened.result()
        except (OSError, SampleError) as error:
            raise ShardError(f"the shard cannot be read ({getattr(error, 'strerror', None) or error})") from error


@dataclass(kw_only=True, eq=False)
class Block:
    """`count` neighbouring rows of a shard, from number `first` on."""

    shard: Shard
    first: int
    count: int
    reading: Future[Rows] | None = None
    """Once it is asked for."""
    rows: Rows | None = None
    """Once it was waited for."""

    def wait(self) -> Rows:
        """The rows."""
        if self.rows is None:
            assert self.reading is not None
            with _naming(f"samples {self.first} to {self.first + self.count - 1} of {self.shard.url}"):
                self.rows = self.reading.result()
        return self.rows


class Part(NamedTuple):
    """What a batch takes from one block: rows of the shard number `rows`, for its `slots`."""

    lane: int
    set_number: int
    shard_number: int
    block: Block
    slots: list[int]
    rows: np.ndarray


class Plan(NamedTuple):
    """A batch to be filled: global positions and set numbers of its samples, int64 `[B]`, and where they come from."""

    positions: np.ndarray
    sets: np.ndarray
    parts: list[Part]


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
        self._members = [
            {name: found.manifest.members[name] for name in self.specs if name in found.manifest.members} for found in self.sets
        ]
        self._block_sizes = np.array([set_size(found.manifest).block for found in self.sets])
        self._openers, self._readers = Workers(max(1, self.threads), "data open"), Workers(self.threads, "data read")
        self._shards: WeakValueDictionary[tuple[int, int], Shard] = WeakValueDictionary()
        self._blocks: WeakValueDictionary[Place, Block] = WeakValueDictionary()
        """By the place of their first row. Those that a plan needs, or a lane is in, are alive."""
        self._lanes: dict[int, Block] = {}
        self._substitutes: dict[int, Shard] = {}
        """The shard that a set's last sample in place of an unreadable one is from."""

    def batches(self, first: int) -> Generator[Batch]:
        """Batches from number `first` on, without end."""
        plans: deque[Plan] = deque()
        planned, begun, size = first, first, len(self.positions(first))
        chunk, fetched = max(1, _PLANNED_SAMPLES // size), self._fetched_samples() // size
        try:
            for number in itertools.count(first):
                while planned <= number + max(self.ahead, fetched):
                    plans.extend(self._plan(np.stack([self.positions(planned + i) for i in range(chunk)])))
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

    def _plan(self, positions: np.ndarray) -> list[Plan]:
        """Some batches, `positions` `[N, B]`. Their shards are being opened from now on."""
        sets, shards, rows = (found.reshape(positions.shape) for found in self.order.locate(positions.reshape(-1)))
        lanes = sets * self.order.lanes + positions % self.order.lanes
        firsts = rows - rows % self._block_sizes[sets]
        numbers = (lanes * (shards.max() + 1) + shards) * (firsts.max() + 1) + firsts
        plans = []
        for batch, keys in enumerate(numbers):
            order = np.argsort(keys, kind="stable")
            starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
            one = order[starts]
            found = [array[batch][one].tolist() for array in (lanes, sets, shards, firsts)]
            slots = np.split(order, starts[1:])
            parts = [
                Part(lane, number, shard, self._block((number, shard, first)), own.tolist(), rows[batch][own])
                for lane, number, shard, first, own in zip(*found, slots, strict=True)
            ]
            plans.append(Plan(positions[batch], sets[batch], parts))
        return plans

    def _block(self, place: Place) -> Block:
        number, shard_number, first = place
        if (block := self._blocks.get(place)) is None:
            shard = self._shard(number, shard_number)
            count = min(int(self._block_sizes[number]), shard.num_samples - first)
            block = self._blocks[place] = Block(shard=shard, first=first, count=count)
        return block

    def _shard(self, number: int, shard_number: int) -> Shard:
        if (shard := self._shards.get((number, shard_number))) is None:
            shard = Shard(self.sets[number], shard_number, self._openers, self.patience, self.cache_dir)
            self._shards[number, shard_number] = shard
        return shard

    def _begin(self, plan: Plan) -> None:
        """Have the batch's blocks read."""
        for part in plan.parts:
            if part.block.reading is None:
                part.block.reading = self._readers.submit(_read_rows, part.block, list(self._members[part.set_number]))

    def _fill(self, plan: Plan) -> Batch:
        count = len(plan.positions)
        tensors = {
            name: torch.empty((count, *spec.shape), dtype=getattr(torch, spec.dtype), pin_memory=self.pin_memory)
            for name, spec in self.specs.items()
        }
        arrays, keys = {name: tensor.numpy() for name, tensor in tensors.items()}, [""] * count
        for part in plan.parts:
            self._lanes[part.lane] = part.block
            rows = part.block.wait()
            chosen = (part.rows - part.block.first).tolist()
            for name, array in arrays.items():
                _put(array, part.slots, rows.arrays.get(name), chosen)
            for slot, row in zip(part.slots, chosen, strict=True):
                if rows.sound[row]:
                    keys[slot] = rows.keys[row]
                else:
                    place = (part.set_number, part.shard_number, part.block.first + row)
                    keys[slot] = self._read_or_replace(place, slot, arrays)
        index, source = torch.from_numpy(plan.positions.copy()), torch.from_numpy(plan.sets.copy())
        return {**tensors, "sample_index": index, "source": source, "key": keys}

    def _read_or_replace(self, place: Place, slot: int, arrays: dict[str, np.ndarray]) -> str:
        """Read one sample, or if it is unreadable the next readable one of its set: later rows, then later shards."""
        number, shard, row = place
        source = self.sets[number]
        for _ in range(source.manifest.num_samples):
            try:
                return self._read_alone((number, shard, row), slot, arrays)
            except SampleError as error:
                reason = str(error)
                self._note((number, shard, row), reason)
                row += 1
                if isinstance(error, ShardError) or row == source.manifest.shards[shard].num_samples:
                    shard, row = (shard + 1) % len(source.urls), 0
        raise UserError(f"{source.name}: no sample can be read ({reason}); encode the set anew.")

    def _read_alone(self, place: Place, slot: int, arrays: dict[str, np.ndarray]) -> str:
        """Read one sample by parsing it. Returns its key."""
        number, shard_number, row = place
        own = self._members[number]
        shard = self._substitutes[number] = self._shard(number, shard_number)
        with _naming(f"sample {row} of {shard.url}"):
            try:
                sample = shard.read(lambda reader: reader.sample(row, list(own)))
            except OSError as error:
                raise SampleError(error.strerror or str(error)) from error
        for name, spec in own.items():
            if MemberSpec(dtype=sample[name].dtype.name, shape=sample[name].shape) != spec:
                raise SampleError(f"its {name} is {sample[name].dtype} {list(sample[name].shape)}, not as in the manifest")
        for name, array in arrays.items():
            _put(array, [slot], sample[name][None] if name in own else None, [0])
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


def _read_rows(block: Block, members: list[str]) -> Rows:
    try:
        return block.shard.read(lambda reader: reader.rows(block.first, block.count, members))
    except (OSError, SampleError):  # each sample is tried alone when its turn comes, and named
        return Rows(arrays={}, keys=[""] * block.count, sound=[False] * block.count)


def _put(array: np.ndarray, slots: Sequence[int], values: Any, chosen: Sequence[int]) -> None:
    """Put the `chosen` ones of a member's `values` into `slots` of a batch, filled up with zeros; all zeros if it has none."""
    if values is None:
        array[slots] = 0
    elif values[0].shape == array.shape[1:]:
        for slot, index in zip(slots, chosen, strict=True):  # faster than indexing with lists, which copies twice
            array[slot] = values[index]
    else:
        array[slots] = 0
        array[slots, : len(values[0])] = values[chosen]


@contextmanager
def _naming(samples: str) -> Iterator[None]:
    """What a thread fails with, other than unreadable data, as a UserError that names the samples."""
    try:
        yield
    except (SampleError, UserError, Stopped):
        raise
    except Exception as error:
        raise UserError(
            f"{samples}: the thread that reads them failed ({type(error).__name__}: {error}); "
            "start the run again, and report it if it comes back."
        ) from error
