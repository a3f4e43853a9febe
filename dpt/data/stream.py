"""The stream of training batches: its order follows from (shards, seed, global batch size), its only state is `samples_seen`.

`order.py` gives each global position its sample. An optimizer step takes the next `global_batch_size` positions; each of its
micro-batches the next `micro_batch_size * world_size` of those; rank r every `world_size`-th of these, from the r-th on. So any
number of ranks and any accumulation see the same batches, and the stream can be resumed at any position.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import partial

import numpy as np

from dpt.data.batches import Batch, BatchReader, Place
from dpt.data.manifest import Manifest, check_manifests, choose_members
from dpt.data.order import MixtureOrder, SetSize, num_lanes
from dpt.data.sources import Patience, resolve
from dpt.errors import UserError

_BLOCK_BYTES = 1 << 20
_LARGEST_BLOCK = 64
_LOCATED = 1024
"""Samples located at a time."""


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
    verify: hash shards ahead of their first use; one that is not as it was written counts as unreadable.

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
        verify: bool = False,
        patience: Patience | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        assert start_sample >= 0
        assert prefetch >= 1
        if not sources:
            raise UserError("dpt.data.shards is empty; name at least one shard folder.")
        if twice := [source for number, source in enumerate(sources) if source in sources[:number]]:
            raise UserError(f"dpt.data.shards names {twice[0]} twice; name it once, with more weight in dpt.data.weights.")
        micro = micro_batch_size or global_batch_size // world_size
        if micro_batch_size is None and (micro < 1 or global_batch_size % world_size):
            raise UserError(f"a global batch of {global_batch_size} does not split over {world_size} ranks; choose a multiple.")
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
        patience = patience or Patience()
        self._sets = [resolve(source, patience) for source in sources]
        check_manifests(self.manifests, tasks={found.manifest.task for found in self._sets})
        sizes = [set_size(found.manifest) for found in self._sets]
        self._order = MixtureOrder(sizes, weights, num_lanes(global_batch_size), seed)
        self._new_reader = partial(
            BatchReader,
            batch_size=micro,
            sets=self._sets,
            sizes=sizes,
            lanes=self._order.lanes,
            specs=choose_members(self.manifests, members),
            threads=num_workers,
            ahead=prefetch,
            bad=self._bad,
            max_bad_samples=max_bad_samples,
            pin_memory=pin_memory,
            patience=patience,
            cache_dir=cache_dir,
            verify=verify,
        )

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
        for batch in self._new_reader(places=self._places(self._handed)):
            self._handed += 1
            yield batch

    def _places(self, number: int) -> Iterator[Sequence[np.ndarray]]:
        """Positions, sets, shards and rows of this rank's micro-batches from `number` on, the run's first being 0."""
        size = self.micro_batch_size
        shape = (max(1, _LOCATED // size), size)
        while True:
            positions = self._start + self._rank + self._world_size * (number * size + np.arange(np.prod(shape)))
            located = (positions, *self._order.locate(positions))
            yield from zip(*(values.reshape(shape) for values in located), strict=True)
            number += shape[0]


def set_size(manifest: Manifest) -> SetSize:
    """What the stream's order depends on. A block is about a megabyte: long reads from disks, little memory."""
    row_bytes = sum(shard.bytes for shard in manifest.shards) // manifest.num_samples
    block = max(1, min(_LARGEST_BLOCK, _BLOCK_BYTES // max(row_bytes, 1)))
    return SetSize(counts=tuple(shard.num_samples for shard in manifest.shards), block=block)
