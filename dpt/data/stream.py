"""The stream of training batches: its order follows from (shards, seed, global batch size), its only state is `samples_seen`.

`order.py` gives each global position its sample. An optimizer step takes the next `global_batch_size` positions; each of its
micro-batches the next `micro_batch_size * world_size` of those; rank r every `world_size`-th of these, from the r-th on. So any
number of ranks and any accumulation see the same batches, and the stream can be resumed at any position.
"""

import atexit
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from dpt.data.batches import Batch, BatchReader, Place, choose_members, set_size
from dpt.data.blocks import Workers
from dpt.data.manifest import Manifest, check_manifests
from dpt.data.order import MixtureOrder, num_lanes
from dpt.data.sources import Patience, resolve
from dpt.errors import UserError


class LatentStream:
    """Endless micro-batches of this rank, from `start_sample` on.

    A batch: the members as CPU tensors `[B, ...]` as stored (`latents`, `label`, ...; what a set of a mixture lacks is zeros),
    `sample_index` int64 `[B]` (global position, the source of every per-sample seed), `source` int64 `[B]` (number of the set
    in `sources`), `key` (list of str).

    sources: shard folders, brace patterns or URLs (`sources.resolve`); weights: share of each, empty for its number of samples.
    global_batch_size: samples of a step over all ranks; micro_batch_size: of one batch (default: all of this rank's).
    start_sample: `samples_seen` of the run to be continued, plus what its rewinds left out.
    num_workers: threads that read, and as many that open or fetch shards (at least one of each).
    members: what to read (default: all but evaluation's). pin_memory: page-locked tensors.
    prefetch: batches filled ahead, and as many more whose blocks are read ahead.
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
        self._bad: dict[Place, str] = {}
        self._max_bad, self._prefetch, self._cache_dir = max_bad_samples, prefetch, cache_dir
        self._pin, self._num_workers = pin_memory, num_workers
        self._patience = patience or Patience()
        self._sets = [resolve(source, self._patience) for source in sources]
        check_manifests(self.manifests, tasks={found.manifest.task for found in self._sets})
        self._specs = choose_members(self._sets, members)
        sizes = [set_size(found.manifest) for found in self._sets]
        self._order = MixtureOrder(sizes, weights, num_lanes(global_batch_size), seed)

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
        patience = replace(self._patience, stop=threading.Event())
        reader = BatchReader(
            sets=self._sets,
            order=self._order,
            specs=self._specs,
            positions=self._positions,
            share=self._world_size,
            threads=self._num_workers,
            ahead=self._prefetch,
            bad=self._bad,
            max_bad_samples=self._max_bad,
            pin_memory=self._pin,
            patience=patience,
            cache_dir=self._cache_dir,
        )
        batches, filler = reader.batches(self._handed), Workers(1, "data fill")
        filled = deque(filler.submit(next, batches) for _ in range(self._prefetch))

        def close() -> None:
            patience.stop.set()
            filler.close()
            with suppress(ValueError):  # the thread is stuck in a read, which nothing can end
                batches.close()

        atexit.register(close)  # a thread at work while the interpreter is taken apart ends in an abort
        try:
            while True:
                batch = filled.popleft().result()
                filled.append(filler.submit(next, batches))
                self._handed += 1
                yield batch
        finally:
            atexit.unregister(close)
            close()

    def _positions(self, number: int) -> np.ndarray:
        """Global positions, int64 `[B]`, of this rank's micro-batch `number`, counted from the start of this run."""
        first = number * self.micro_batch_size
        return self._start + self._rank + self._world_size * np.arange(first, first + self.micro_batch_size)
