"""Filling batches: positions of the stream in, members out; unreadable samples are replaced, named and counted."""

import logging
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpt.data.blocks import BlockPlace, Blocks
from dpt.data.fetch import Patience, retry
from dpt.data.manifest import Manifest, MemberSpec
from dpt.data.order import MixtureOrder, SetSize
from dpt.data.reader import SampleError
from dpt.data.shards import MEMBER_ORDER
from dpt.data.sources import ShardSet
from dpt.data.store import ShardError, ShardStore
from dpt.errors import UserError

log = logging.getLogger("dpt.data")

EVALUATION_MEMBERS = ("image", "truth", "code_mask")

Arrays = dict[str, np.ndarray]
Place = tuple[int, int, int]
"""A sample: number of its set, of its shard, of its row."""

_BLOCK_BYTES = 1 << 20
_LARGEST_BLOCK = 64
_PLANNED_SAMPLES = 4096


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


@dataclass(kw_only=True)
class Filled:
    """The samples of one batch: `arrays` by member, set numbers and keys, and bad samples newly found."""

    arrays: Any
    sets: np.ndarray
    keys: list[str]
    bad: dict[Place, str]


class _Plan:
    """Some batches ahead: where their samples lie, and which blocks each batch is the first or the last to need."""

    def __init__(
        self, sets: np.ndarray, shards: np.ndarray, rows: np.ndarray, ends: np.ndarray, block_sizes: np.ndarray
    ) -> None:
        self.sets, self.shards, self.rows = sets, shards, rows
        self.ends = ends
        """Where each batch ends in these arrays."""
        block = block_sizes[sets]
        self.offset = rows % block
        """Of each sample, its row in its block."""
        numbers = (sets * (shards.max() + 1) + shards) * (rows.max() + 1) + rows - self.offset
        _, first, self.which = np.unique(numbers, return_index=True, return_inverse=True)
        """For each sample, the index of its block among the plan's."""
        last = len(numbers) - 1 - np.unique(numbers[::-1], return_index=True)[1]
        places = (sets[first].tolist(), shards[first].tolist(), (rows - self.offset)[first].tolist())
        self.places: list[BlockPlace] = list(zip(*places, strict=True))
        self.new, self.done = self._by_batch(first), self._by_batch(last)
        """Indices of the blocks that each batch is the first, or the last, to need."""
        self.uses = np.bincount(self.which, minlength=len(first)).tolist()
        """Samples of each block that the plan needs."""
        self.arena = np.full(len(first), -1)
        """Of each block once it is loaded: the number of its arena (-1: none), and its first row there."""
        self.start = np.zeros(len(first), np.int64)

    def _by_batch(self, samples: np.ndarray) -> list[list[int]]:
        lists: list[list[int]] = [[] for _ in self.ends]
        for block, batch in enumerate(np.searchsorted(self.ends, samples, "right").tolist()):
            lists[batch].append(block)
        return lists


class BatchReader:
    """Reads samples into batches. One to a process; it holds open shards, some blocks, and the list of bad samples.

    `max_bad_samples`: how many distinct unreadable samples are replaced before a UserError.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        order: MixtureOrder,
        specs: dict[str, MemberSpec],
        *,
        max_bad_samples: int = 0,
        patience: Patience | None = None,
        cache_dir: str = "",
    ) -> None:
        self._sets, self._order, self._specs = sets, order, specs
        self._patience = patience or Patience()
        self._max_bad = max_bad_samples
        members = [source.manifest.members for source in sets]
        # A set whose member is shorter than the batch's, or absent, is filled up with zeros.
        self._alike = all(own.get(name) == spec for own in members for name, spec in specs.items())
        self._store = ShardStore(sets, [[name for name in specs if name in own] for own in members], self._patience, cache_dir)
        sizes = [set_size(source.manifest) for source in sets]
        self._block_sizes = np.array([size.block for size in sizes])
        self._blocks = Blocks(self._store, sizes, self._patience, expected=2 * order.lanes)
        self.bad: dict[Place, str] = {}
        # Shards and blocks are kept while plans may come back to them: rare sets of a mixture are visited seldom.
        rarest = min(order.shares) / sum(order.shares)
        self._kept_plans = 2 + int(order.lanes / (_PLANNED_SAMPLES * rarest))

    def batches(
        self, first: int, positions: Callable[[int], np.ndarray], empty: Callable[[int], Any], view: Callable[[Any], Arrays]
    ) -> Generator[Filled]:
        """Batches from number `first` on.

        positions: batch number -> global positions of its samples; empty: number of samples -> new storage; view: storage
        -> its numpy arrays (contiguous `[B, ...]`, by member).
        """
        number, plan_number = first, 0
        plan = self._plan(number, 1, positions, plan_number)  # short: the first batch comes soon
        try:
            while True:
                batches = len(plan.ends)
                upcoming = self._plan(number + batches, 4 * batches, positions, plan_number + 1)
                kept = set(upcoming.places)
                for batch in range(batches):
                    yield self._fill(plan, batch, empty, view)
                    for block in plan.done[batch]:
                        place = plan.places[block]
                        self._blocks.use(place, plan.uses[block], plan_number, again=place in kept)
                number, plan_number, plan = number + batches, plan_number + 1, upcoming
                self._blocks.drop_unused(since=plan_number - self._kept_plans)
                self._store.release(before=plan_number - self._kept_plans)
        finally:
            self._store.close()

    def _plan(self, first: int, most: int, positions: Callable[[int], np.ndarray], plan_number: int) -> _Plan:
        """At most `most` batches from number `first` on; their shards are expected from now on."""
        parts: list[np.ndarray] = []
        planned = 0
        while planned == 0 or (len(parts) < min(most, _PLANNED_SAMPLES) and planned < _PLANNED_SAMPLES):
            parts.append(positions(first + len(parts)))  # none of a batch's may be this reader's
            planned += len(parts[-1])
        sets, shards, rows = self._order.locate(np.concatenate(parts))
        for place in set(zip(sets.tolist(), shards.tolist(), strict=True)):
            self._store.expect(place, plan_number)
        ends = np.cumsum([len(part) for part in parts])
        return _Plan(sets, shards, rows, ends, self._block_sizes)

    def _fill(self, plan: _Plan, batch: int, empty: Callable[[int], Any], view: Callable[[Any], Arrays]) -> Filled:
        for block in plan.new[batch]:
            plan.arena[block], plan.start[block] = self._blocks.load(plan.places[block])
        here = slice(int(plan.ends[batch - 1]) if batch else 0, int(plan.ends[batch]))
        sets, rows, which = plan.sets[here], plan.rows[here], plan.which[here]
        lying, arenas = plan.start[which] + plan.offset[here], plan.arena[which]
        storage, known = empty(len(sets)), len(self.bad)
        arrays = view(storage)
        if len(sets) and arenas[0] >= 0 and (arenas == arenas[0]).all():
            keys, sound = self._blocks.arenas[arenas[0]].gather(lying, arrays, np.arange(len(sets)), whole=self._alike)
        else:
            keys, sound = self._gather_mixed(lying, arenas, arrays)
        for slot in np.flatnonzero(~sound).tolist():
            place = (int(sets[slot]), int(plan.shards[here][slot]), int(rows[slot]))
            keys[slot] = self._read_or_replace(place, slot, arrays)
        bad = dict(list(self.bad.items())[known:]) if len(self.bad) > known else {}
        return Filled(arrays=storage, sets=sets, keys=keys, bad=bad)

    def _gather_mixed(self, lying: np.ndarray, arenas: np.ndarray, arrays: Arrays) -> tuple[list[str], np.ndarray]:
        """As `Arena.gather`, from rows that lie in several arenas; -1 for those in none, which are not sound."""
        keys, sound = [""] * len(lying), np.zeros(len(lying), bool)
        for number in np.unique(arenas[arenas >= 0]).tolist():
            slots = np.flatnonzero(arenas == number)
            found, sound[slots] = self._blocks.arenas[number].gather(lying[slots], arrays, slots, whole=False)
            for slot, key in zip(slots.tolist(), found, strict=True):
                keys[slot] = key
        return keys, sound

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
        """Read one sample by parsing it, after a read error again on a newly opened shard. Returns its key."""
        number, shard, row = place
        own = self._sets[number].manifest.members
        wanted = [name for name in arrays if name in own]

        def again() -> dict[str, Any]:
            return self._store.reopen((number, shard)).reader.sample(row, wanted)

        try:
            sample = self._store.get((number, shard)).reader.sample(row, wanted)
        except OSError:
            try:
                sample = retry(again, self._patience)
            except OSError as error:
                raise SampleError(error.strerror or str(error)) from error
        for name, array in arrays.items():
            array[slot] = 0
            if name in own:
                value = sample[name]
                if MemberSpec(dtype=value.dtype.name, shape=value.shape) != own[name]:
                    raise SampleError(f"its {name} is {value.dtype} {list(value.shape)}, not as in the manifest")
                array[(slot, slice(0, len(value))) if value.ndim else slot] = value
        return str(sample["key"])

    def _note(self, place: Place, reason: str) -> None:
        if place not in self.bad:
            self.bad[place] = f"sample {place[2]} of {self._sets[place[0]].urls[place[1]]}: {reason}"
            log.warning("unreadable: %s; another sample takes its place", self.bad[place])
            check_bad(self.bad, self._max_bad)


def check_bad(bad: dict[Place, str], max_bad_samples: int) -> None:
    """UserError if more samples are unreadable than allowed."""
    if len(bad) > max_bad_samples:
        raise UserError(
            f"{list(bad.values())[-1]}; unreadable samples: {len(bad)}, dpt.data.max_bad_samples: {max_bad_samples}; "
            "encode the set anew or raise the field."
        )
