"""The stream of training batches: its order follows from (shards, seed, global batch size), its only state is `samples_seen`.

`order.py` gives each global position its sample. An optimizer step takes the next `global_batch_size` positions; each of its
micro-batches the next `micro_batch_size * world_size` of those; rank r every `world_size`-th of these, from the r-th on. So any
number of ranks and any accumulation see the same batches, and the stream can be resumed at any position.
"""

import itertools
import math
import weakref
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dpt.data.ahead import Ahead, in_workers
from dpt.data.batches import BatchReader, Filled, Place, check_bad, choose_members, set_size
from dpt.data.fetch import Patience
from dpt.data.manifest import Manifest, check_manifests
from dpt.data.order import MixtureOrder, num_lanes
from dpt.data.sources import resolve
from dpt.errors import UserError

Batch = dict[str, Any]
Bad = dict[Place, str]


class LatentStream:
    """Endless micro-batches of this rank, from `start_sample` on.

    A batch: the members as CPU tensors `[B, ...]` as stored (`latents`, `label`, ...; what a set of a mixture lacks is zeros),
    `sample_index` int64 `[B]` (global position, the source of every per-sample seed), `source` int64 `[B]` (number of the set
    in `sources`), `key` (list of str).

    sources: shard folders, brace patterns or URLs (`sources.resolve`); weights: share of each, empty for its number of samples.
    global_batch_size: samples of a step over all ranks; micro_batch_size: of one batch (default: all of this rank's).
    start_sample: `samples_seen` of the run to be continued. num_workers: reader processes; 0 reads in a thread.
    members: what to read (default: all but evaluation's). pin_memory: page-locked tensors. prefetch: batches read ahead.
    max_bad_samples: unreadable samples of this rank that are replaced by a neighbour, with a warning, before a UserError.
    cache_dir: folder that keeps shards fetched from URLs; empty: fetched anew when needed again.

    UserError if sources are missing, do not fit together, or the batch does not split.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        global_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
        start_sample: int = 0,
        num_workers: int = 0,
        weights: Sequence[float] = (),
        members: Collection[str] | None = None,
        max_bad_samples: int = 0,
        pin_memory: bool = False,
        prefetch: int = 4,
        cache_dir: str = "",
        patience: Patience | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        assert start_sample >= 0
        assert prefetch >= 1
        if not sources:
            raise UserError("dpt.data.shards is empty; name at least one shard folder.")
        micro = micro_batch_size or global_batch_size // world_size
        if micro < 1 or global_batch_size % (micro * world_size):
            raise UserError(
                f"a global batch of {global_batch_size} does not split into micro-batches of {micro} on {world_size} ranks; "
                "choose a multiple of their product."
            )
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro
        self.accumulation_steps = global_batch_size // (micro * world_size)
        self._rank, self._world_size, self._start = rank, world_size, start_sample
        self._handed = 0
        self._bad: Bad = {}
        self._max_bad, self._depth, self._cache_dir = max_bad_samples, prefetch, cache_dir
        self._pool = _Pool(pin_memory)
        self._patience = patience or Patience()
        self._sets = [resolve(source, self._patience) for source in sources]
        check_manifests(self.manifests, tasks={found.manifest.task for found in self._sets})
        self._specs = choose_members(self._sets, members)
        lanes = num_lanes(global_batch_size)
        self._order = MixtureOrder([set_size(found.manifest) for found in self._sets], weights, lanes, seed)
        self._cycle = lanes // math.gcd(lanes, world_size)
        """This rank's samples come from its lanes in turn, with this period."""
        self.num_workers = min(num_workers, self._cycle)

    @property
    def samples_seen(self) -> int:
        """Samples handed out so far by all ranks together, those before this run included: the stream's whole state."""
        return self._start + self._handed * self.micro_batch_size * self._world_size

    @property
    def num_samples(self) -> int:
        """Samples of all sets: an epoch."""
        return self._order.num_samples

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The manifest of each source, by name."""
        return {found.name: found.manifest for found in self._sets}

    @property
    def bad_samples(self) -> list[str]:
        """The unreadable samples met so far, each with its reason."""
        return list(self._bad.values())

    def __iter__(self) -> Iterator[Batch]:
        first = self._handed
        batches = self._merged(first) if self.num_workers else self._direct(first)
        ahead = Ahead(batches, self._depth)
        try:
            for batch, bad in ahead:
                self._bad.update(bad)
                check_bad(self._bad, self._max_bad)
                self._handed += 1
                yield batch
        finally:
            ahead.close()

    def _positions(self, number: int) -> np.ndarray:
        """Global positions, int64 `[B]`, of this rank's micro-batch `number`, counted from the start of this run."""
        first = number * self.micro_batch_size
        return self._start + self._rank + self._world_size * np.arange(first, first + self.micro_batch_size)

    def _slots(self, number: int, worker: int | None) -> np.ndarray:
        """Slots of micro-batch `number` that a reader process fills: those of its lanes. None fills all."""
        slots = np.arange(self.micro_batch_size)
        if worker is None:
            return slots
        place = number * self.micro_batch_size + slots
        return slots[place % self._cycle % self.num_workers == worker]

    def _reader(self) -> BatchReader:
        return BatchReader(
            self._sets,
            self._order,
            self._specs,
            max_bad_samples=self._max_bad,
            patience=self._patience,
            cache_dir=self._cache_dir,
        )

    def _direct(self, first: int) -> Generator[tuple[Batch, Bad]]:
        """Batches read in this process, each with the bad samples newly found."""
        for number, filled in enumerate(self._reader().batches(first, self._positions, self._new, _arrays), first):
            yield self._finish(number, filled.arrays, filled.sets, filled.keys), filled.bad

    def _parts(self, first: int, worker: int) -> Generator[Filled | str]:
        """What one reader process reads of each micro-batch, or the sentence that it fails with."""

        def positions(number: int) -> np.ndarray:
            return self._positions(number)[self._slots(number, worker)]

        try:
            yield from self._reader().batches(first, positions, self._new, _arrays)
        except UserError as error:
            yield str(error)

    def _merged(self, first: int) -> Generator[tuple[Batch, Bad]]:
        """Batches put together from what the reader processes read."""
        parts = in_workers(lambda worker: self._parts(first, worker), self.num_workers, self._depth)
        try:
            for number in itertools.count(first):
                merged = self._merge(number, parts)
                if isinstance(merged, str):
                    raise UserError(merged)
                yield merged
        finally:
            del parts  # ends the processes now: once garbage is collected, their queues are gone first and the end takes long

    def _merge(self, number: int, parts: Iterator[Filled | str]) -> tuple[Batch, Bad] | str:
        tensors = self._new(self.micro_batch_size)
        sets, keys = np.empty(self.micro_batch_size, np.int64), [""] * self.micro_batch_size
        bad: Bad = {}
        for worker in range(self.num_workers):
            part = next(parts)
            if isinstance(part, str):
                return part
            slots = self._slots(number, worker)
            for name, array in _arrays(part.arrays).items():
                tensors[name].numpy()[slots] = array
            sets[slots] = part.sets
            for slot, key in zip(slots.tolist(), part.keys, strict=True):
                keys[slot] = key
            bad.update(part.bad)
        return self._finish(number, tensors, sets, keys), bad

    def _new(self, count: int) -> dict[str, torch.Tensor]:
        """Uninitialised members of `count` samples, in this process's memory."""
        return {name: self._pool.take((count, *spec.shape), spec.dtype) for name, spec in self._specs.items()}

    def _finish(self, number: int, tensors: dict[str, torch.Tensor], sets: np.ndarray, keys: list[str]) -> Batch:
        index, source = torch.from_numpy(self._positions(number)), torch.from_numpy(sets.copy())
        return {**tensors, "sample_index": index, "source": source, "key": keys}


class _Pool:
    """New tensors in memory that earlier ones have let go of: fresh pages cost as much as filling them."""

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._free: dict[tuple[tuple[int, ...], str], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """A CPU tensor, uninitialised. Page-locked memory is kept and reused by torch itself."""
        if self._pin:
            return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True)
        free = self._free.setdefault((shape, dtype), [])
        memory = free.pop() if free else np.empty(shape, dtype)
        lent = memory[...]
        weakref.finalize(lent, free.append, memory).atexit = False  # once the last tensor on it is gone
        return torch.from_numpy(lent)


def _arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}
