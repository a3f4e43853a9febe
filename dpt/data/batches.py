"""Filling batches: positions of the stream in, members out; unreadable samples are replaced, named and counted."""

import logging
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch

from dpt.data.fetch import Patience, Stopped, is_url
from dpt.data.manifest import Manifest, MemberSpec
from dpt.data.order import MixtureOrder, SetSize
from dpt.data.prefetch import Workers
from dpt.data.reader import Rows, SampleError, ShardReader
from dpt.data.shards import MEMBER_ORDER
from dpt.data.sources import ShardSet, open_shard
from dpt.errors import UserError

log = logging.getLogger("dpt.data")

EVALUATION_MEMBERS = ("image", "truth", "code_mask")

T = TypeVar("T")
Arrays = dict[str, np.ndarray]
Batch = dict[str, Any]
Place = tuple[int, int, int]
"""A sample: number of its set, of its shard, of its row."""

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
    chosen = set(MEMBER_ORDER) - set(EVALUATION_MEMBERS) if wanted is None else set(wanted)
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
        self.url, self._patience = source.urls[number], patience
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
    """Neighbouring rows of a shard, from number `first` on, that a thread reads."""

    shard: Shard
    first: int
    rows: Future[Rows]


@dataclass(kw_only=True, eq=False)
class _Part:
    """What a batch takes from one block: the samples of `slots`, which are rows `rows` of the shard."""

    lane: int
    place: tuple[int, int]
    slots: np.ndarray
    rows: np.ndarray
    shard: Shard
    block: Block | None = None


@dataclass(kw_only=True, eq=False)
class _Plan:
    """A batch to be filled: global positions and set numbers of its samples, int64 `[B]`, and where they come from."""

    positions: np.ndarray
    sets: np.ndarray
    parts: list[_Part]


class BatchReader:
    """Reads samples into batches: one thread calls `batches`, others open shards and read blocks ahead of it.

    A lane of a set goes through its blocks one after the other, and keeps the one it is in. `threads`: that read, and as many
    that open or fetch. ahead: batches whose blocks are being read. share: one of so many samples of the stream is this reader's.
    bad: where unreadable samples are noted; `max_bad_samples` of them are replaced before a UserError.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        order: MixtureOrder,
        specs: dict[str, MemberSpec],
        *,
        threads: int,
        ahead: int,
        share: int,
        bad: dict[Place, str],
        max_bad_samples: int,
        pin_memory: bool,
        patience: Patience,
        cache_dir: str,
    ) -> None:
        self._sets, self._order, self._specs, self._ahead = sets, order, specs, ahead
        self.bad, self._max_bad, self._pin = bad, max_bad_samples, pin_memory
        self._patience, self._cache_dir = patience, cache_dir
        self._members = [
            {name: found.manifest.members[name] for name in specs if name in found.manifest.members} for found in sets
        ]
        self._block_sizes = np.array([set_size(found.manifest).block for found in sets])
        self._openers, self._readers = Workers(threads, "data open"), Workers(threads, "data read")
        self._shards: WeakValueDictionary[tuple[int, int], Shard] = WeakValueDictionary()
        self._blocks: WeakValueDictionary[tuple[int, int, int], Block] = WeakValueDictionary()
        self._lanes: dict[int, Block] = {}
        """The block that each lane is in."""
        self._substitutes: dict[int, Shard] = {}
        """The shard that last gave a sample in place of a set's unreadable one."""
        # Shards behind URLs are fetched ahead for as long as a lane takes to go through one.
        remote = [number for number, found in enumerate(sets) if is_url(found.urls[0])]
        lengths = [sets[n].manifest.num_samples / len(sets[n].urls) * order.period / order.shares[n] for n in remote]
        self._fetched = min([_FETCHED_SAMPLES, *(int(order.lanes * length) // share for length in lengths)]) if remote else 0

    def batches(self, first: int, positions: Callable[[int], np.ndarray]) -> Generator[Batch]:
        """Batches from number `first` on. positions: batch number -> global positions of its samples, int64 `[B]`."""
        plans: deque[_Plan] = deque()
        size = len(positions(first))
        number, chunk, begun = first, max(1, _PLANNED_SAMPLES // size), 0
        try:
            while True:
                while len(plans) <= max(self._ahead, self._fetched // size):
                    plans.extend(self._plan(np.stack([positions(number + i) for i in range(chunk)])))
                    number += chunk
                for plan in islice(plans, begun, self._ahead + 1):
                    self._begin(plan)
                begun = self._ahead
                yield self._fill(plans.popleft())
        finally:
            self._patience.stop.set()
            self._openers.close()
            self._readers.close()

    def _plan(self, positions: np.ndarray) -> list[_Plan]:
        """Some batches, `positions` `[N, B]`. Their shards are being opened from now on."""
        sets, shards, rows = (found.reshape(positions.shape) for found in self._order.locate(positions.reshape(-1)))
        blocks, lanes = rows // self._block_sizes[sets], sets * self._order.lanes + positions % self._order.lanes
        numbers = (lanes * (shards.max() + 1) + shards) * (blocks.max() + 1) + blocks
        return [self._plan_one(*arrays) for arrays in zip(positions, sets, shards, rows, lanes, numbers, strict=True)]

    def _plan_one(
        self,
        positions: np.ndarray,
        sets: np.ndarray,
        shards: np.ndarray,
        rows: np.ndarray,
        lanes: np.ndarray,
        numbers: np.ndarray,
    ) -> _Plan:
        """One batch, arrays `[B]`; `numbers` tell apart the blocks of each lane."""
        order = np.argsort(numbers, kind="stable")
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        first = order[starts]
        places = zip(sets[first].tolist(), shards[first].tolist(), strict=True)
        parts = [
            _Part(lane=lane, place=place, slots=slots, rows=rows[slots], shard=self._shard(place))
            for lane, place, slots in zip(lanes[first].tolist(), places, np.split(order, starts[1:]), strict=True)
        ]
        return _Plan(positions=positions, sets=sets, parts=parts)

    def _shard(self, place: tuple[int, int]) -> Shard:
        if (shard := self._shards.get(place)) is None:
            shard = Shard(self._sets[place[0]], place[1], self._openers, self._patience, self._cache_dir)
            self._shards[place] = shard
        return shard

    def _begin(self, plan: _Plan) -> None:
        """Have the blocks of a batch read."""
        for part in plan.parts:
            number, shard = part.place
            size = int(self._block_sizes[number])
            first = int(part.rows[0]) // size * size
            if (block := self._blocks.get((number, shard, first))) is None:
                count = min(size, self._sets[number].manifest.shards[shard].num_samples - first)
                rows = self._readers.submit(_read_rows, part.shard, first, count, self._members[number])
                block = self._blocks[number, shard, first] = Block(shard=part.shard, first=first, rows=rows)
            part.block = block

    def _fill(self, plan: _Plan) -> Batch:
        count = len(plan.positions)
        tensors = {
            name: torch.empty((count, *spec.shape), dtype=getattr(torch, spec.dtype), pin_memory=self._pin)
            for name, spec in self._specs.items()
        }
        arrays, keys = {name: tensor.numpy() for name, tensor in tensors.items()}, [""] * count
        for part in plan.parts:
            block = part.block
            assert block is not None
            self._lanes[part.lane] = block
            with _naming(f"samples {block.first} and on of {block.shard.url}"):
                rows = block.rows.result()
            inside = part.rows - block.first
            sound = rows.sound[inside]
            if sound.any():
                self._copy(part.place[0], {name: array[inside] for name, array in rows.arrays.items()}, part.slots, arrays)
            for slot, row, good in zip(part.slots.tolist(), inside.tolist(), sound.tolist(), strict=True):
                keys[slot] = rows.keys[row] if good else self._read_or_replace((*part.place, block.first + row), slot, arrays)
        index, source = torch.from_numpy(plan.positions.copy()), torch.from_numpy(plan.sets.copy())
        return {**tensors, "sample_index": index, "source": source, "key": keys}

    def _copy(self, number: int, values: Arrays, slots: np.ndarray | list[int], arrays: Arrays) -> None:
        """Samples of a set, `[N, ...]` by member, into `slots` of a batch, filled up with zeros."""
        own = self._members[number]
        for name, array in arrays.items():
            if name in own and own[name].shape == array.shape[1:]:
                array[slots] = values[name]
                continue
            array[slots] = 0
            if name in own:
                array[slots, : own[name].shape[0]] = values[name]

    def _read_or_replace(self, place: Place, slot: int, arrays: Arrays) -> str:
        """Read one sample, or if it is unreadable the next readable one of its set: later rows, then later shards."""
        number, shard, row = place
        shards = self._sets[number].manifest.shards
        for _ in range(self._sets[number].manifest.num_samples):
            try:
                return self._read_alone((number, shard, row), slot, arrays)
            except SampleError as error:
                reason = str(error)
                self._note((number, shard, row), reason)
                if isinstance(error, ShardError) or row + 1 == shards[shard].num_samples:
                    shard, row = (shard + 1) % len(shards), 0
                else:
                    row += 1
        raise UserError(f"{self._sets[number].name}: no sample can be read ({reason}); encode the set anew.")

    def _read_alone(self, place: Place, slot: int, arrays: Arrays) -> str:
        """Read one sample by parsing it. Returns its key."""
        number, row, own = place[0], place[2], self._members[place[0]]
        shard = self._substitutes[number] = self._shard(place[:2])
        with _naming(f"sample {row} of {shard.url}"):
            try:
                sample = shard.read(lambda reader: reader.sample(row, list(own)))
            except OSError as error:
                raise SampleError(error.strerror or str(error)) from error
        for name, spec in own.items():
            if MemberSpec(dtype=sample[name].dtype.name, shape=sample[name].shape) != spec:
                raise SampleError(f"its {name} is {sample[name].dtype} {list(sample[name].shape)}, not as in the manifest")
        self._copy(number, {name: sample[name][None] for name in own}, [slot], arrays)
        return str(sample["key"])

    def _note(self, place: Place, reason: str) -> None:
        if place not in self.bad:
            self.bad[place] = f"sample {place[2]} of {self._sets[place[0]].urls[place[1]]}: {reason}"
            log.warning("unreadable: %s; another sample takes its place", self.bad[place])
            if len(self.bad) > self._max_bad:
                raise UserError(
                    f"{self.bad[place]}; unreadable samples: {len(self.bad)}, dpt.data.max_bad_samples: {self._max_bad}; "
                    "encode the set anew or raise the field."
                )


def _read_rows(shard: Shard, first: int, count: int, promised: dict[str, MemberSpec]) -> Rows:
    try:
        return shard.read(lambda reader: reader.rows(first, count, promised))
    except (OSError, SampleError):  # each sample is tried alone when its turn comes, and named
        return Rows(arrays={}, keys=[""] * count, sound=np.zeros(count, bool))


@contextmanager
def _naming(samples: str) -> Iterator[None]:
    """What a thread dies of, other than unreadable data, as a UserError that names the samples."""
    try:
        yield
    except (SampleError, UserError, Stopped):
        raise
    except Exception as error:
        raise UserError(
            f"{samples}: the thread that reads them failed ({type(error).__name__}: {error}); this is no fault of the shard, "
            "so start the run again, and report it if it comes back."
        ) from error
