"""The stream of training batches: its order depends on (shards, seed, global batch size), its only state is `samples_seen`.

`order.py` gives each global position its sample. An optimizer step takes the next `global_batch_size` positions; each of its
micro-batches the next `micro_batch_size * world_size` of those; rank r every `world_size`-th of these, from the r-th on. So any
number of ranks and any accumulation see the same batches, and the stream can resume at any position.

One thread plans and fills batches. Others open (or fetch) the shards that it will need, and read their blocks ahead.
"""

import atexit
import logging
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch

from dpt import distributed
from dpt.data.manifest import Manifest, check_manifests, choose_members
from dpt.data.order import MixtureOrder, SetSize, num_lanes
from dpt.data.reader import Rows
from dpt.data.shards import Block, Shard
from dpt.data.sources import resolve
from dpt.errors import UserError
from dpt.threads import Workers
from dpt.urls import Patience

log = logging.getLogger("dpt.data")

Batch = dict[str, Any]
Place = tuple[int, int, int]
"""A sample: the numbers of its set, shard and row."""

_BLOCK_BYTES = 1 << 20
_LARGEST_BLOCK = 64
_LOCATED = 1024
"""Samples located at a time."""
_OPENED_AHEAD = 65536
"""How many of the stream's next samples have their shards opened, or fetched, ahead."""


class Places(NamedTuple):
    """Contents of a batch: positions in the stream, sets, shards and rows of its samples, int64 `[B]` each."""

    positions: np.ndarray
    sets: np.ndarray
    shards: np.ndarray
    rows: np.ndarray


@dataclass(eq=False)
class LatentStream:
    """Endless micro-batches of this rank, from `start_sample` on.

    A batch: the members as CPU tensors `[B, ...]` as stored (`latents`, `label`, ...; missing members of a set are zeros),
    `sample_index` int64 `[B]` (global position, the source of every per-sample seed), `source` int64 `[B]` (number of the set
    in `sources`), `key` (list of str). `manifests`: of each source, by name; `num_samples`: of all sets, an epoch;
    `bad_samples`: unreadable ones found so far, each with its reason.

    UserError if sources are missing, do not fit together, or the batch does not split.
    """

    sources: Sequence[str]
    """Shard folders, brace patterns or URLs (`sources.resolve`)."""
    _: KW_ONLY
    global_batch_size: int
    """Samples per step over all ranks."""
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int = 0
    """Samples per batch; 0: all of this rank's."""
    start_sample: int = 0
    """`samples_seen` of the run to continue, plus what its rewinds skipped."""
    num_workers: int = 0
    """Reading threads, and as many that open or fetch shards (at least one); 0: the thread that fills batches reads."""
    weights: Sequence[float] = ()
    """Share of each source, empty for its number of samples."""
    members: Collection[str] | None = None
    """Members to read; None: all but those only for evaluation."""
    max_bad_samples: int = 0
    """Unreadable samples of this rank to replace by a neighbour, with a warning, before a UserError."""
    pin_memory: bool = False
    """Page-locked tensors."""
    prefetch: int = 4
    """Batches filled ahead, and as many more whose blocks are read ahead."""
    cache_dir: str = ""
    """Folder for shards fetched from URLs; empty: fetched again when needed."""
    verify: bool = False
    """Hash shards before their first use; a changed one counts as unreadable."""
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        assert self.start_sample >= 0
        assert self.prefetch >= 1
        if not self.sources:
            raise UserError("dpt.data.shards is empty; name at least one shard folder.")
        if twice := [source for number, source in enumerate(self.sources) if source in self.sources[:number]]:
            raise UserError(f"dpt.data.shards names {twice[0]} twice; name it once, with more weight in dpt.data.weights.")
        self.micro_batch_size = self.micro_batch_size or self.global_batch_size // self.world_size
        self.accumulation_steps = self.global_batch_size // max(1, self.micro_batch_size * self.world_size)
        if not self.accumulation_steps or self.global_batch_size % (self.micro_batch_size * self.world_size):
            raise UserError(
                f"a global batch of {self.global_batch_size} does not split into micro-batches of {self.micro_batch_size} on "
                f"{self.world_size} ranks; choose a multiple of their product."
            )
        self.sets = [resolve(source, self.patience) for source in self.sources]
        self.manifests = {found.name: found.manifest for found in self.sets}
        check_manifests(self.manifests)
        self.specs = choose_members(self.manifests, self.members)
        self.sizes = [set_size(manifest) for manifest in self.manifests.values()]
        self.order = MixtureOrder(self.sizes, self.weights, num_lanes(self.global_batch_size), self.seed)
        self.num_samples = self.order.num_samples
        self.bad_samples: list[str] = []
        self.bad_places: set[Place] = set()
        self._handed = 0

    @property
    def samples_seen(self) -> int:
        """Samples handed out so far by all ranks together, including those before this run: the stream's whole state."""
        return self.start_sample + self._handed * self.micro_batch_size * self.world_size

    def __iter__(self) -> Iterator[Batch]:
        """The next batches, `prefetch` of them filled ahead."""
        reader = BatchReader(self)
        atexit.register(reader.close)  # a thread at work while the interpreter is taken apart ends in an abort
        try:
            batches = reader.batches(self._places(self._handed))
            filled = deque(reader.filler.submit(batches.__next__) for _ in range(self.prefetch))
            while True:
                batch = filled.popleft().result()
                filled.append(reader.filler.submit(batches.__next__))
                self._handed += 1
                yield batch
        finally:
            atexit.unregister(reader.close)
            reader.close()

    def _places(self, number: int) -> Iterator[Places]:
        """Contents of this rank's micro-batches, from `number` on (0 is the run's first)."""
        size = self.micro_batch_size
        shape = (max(1, _LOCATED // size), size)
        while True:
            positions = self.start_sample + self.rank + self.world_size * (number * size + np.arange(np.prod(shape)))
            located = (positions, *self.order.locate(positions))
            yield from map(Places, *(values.reshape(shape) for values in located))
            number += shape[0]


def set_size(manifest: Manifest) -> SetSize:
    """The inputs of the stream's order. A block is about a megabyte: long reads from disks, little memory."""
    row_bytes = sum(shard.bytes for shard in manifest.shards) // manifest.num_samples
    block = max(1, min(_LARGEST_BLOCK, _BLOCK_BYTES // max(row_bytes, 1)))
    return SetSize(counts=tuple(shard.num_samples for shard in manifest.shards), block=block)


class BatchReader:
    """Fills batches of a stream. A lane of a set goes through its blocks in turn, and keeps the current one.

    Readers live as long as they are referenced: a shard by its blocks, or from when a batch that needs it comes into
    view; a block by a batch to be filled, or a lane.
    """

    def __init__(self, stream: LatentStream) -> None:
        self._stream, self._lanes_of_set = stream, stream.order.lanes
        self._patience = replace(stream.patience, stop=threading.Event())
        self._rows = [self._memory(number) for number in range(len(stream.sets))]
        self._block_sizes = np.array([size.block for size in stream.sizes])
        self._openers = Workers(max(1, stream.num_workers), "data open")
        self._readers = Workers(stream.num_workers, "data read")
        self.filler = Workers(1, "data fill")
        self._most_open = distributed.raise_file_limit() * 3 // 4  # shards; other files are open too
        self._shards: WeakValueDictionary[tuple[int, int], Shard] = WeakValueDictionary()
        self._blocks: WeakValueDictionary[Place, Block] = WeakValueDictionary()
        """Blocks keyed by the place of their first row."""
        self._kept: dict[int, Block] = {}
        """The current block of each lane of each set and, below 0, that of a set's last substitute."""

    def _memory(self, number: int) -> Rows:
        """Memory for the blocks of a set that may be needed at once, and for those that threads release a moment later."""
        stream, size = self._stream, self._stream.sizes[number]
        # At worst one for each sample, for the substitutes of a batch, and for each lane.
        needed = (stream.prefetch + 2) * stream.micro_batch_size + self._lanes_of_set + 1
        slots = min(needed, sum(-(-count // size.block) for count in size.counts)) + stream.num_workers
        return Rows(stream.sets[number].manifest.members, stream.specs, size.block, slots)

    def close(self) -> None:
        """End the threads; fetches are abandoned."""
        self._patience.stop.set()
        for workers in (self.filler, self._openers, self._readers):
            workers.close()

    def batches(self, places: Iterator[Places]) -> Iterator[Batch]:
        """Yield batches filled from `places`, each while the blocks of the next `prefetch` ones are being read."""
        begun: deque[tuple[Places, list[Block]]] = deque()
        for batch in self._opened(places):
            begun.append((batch, self._begin(batch)))
            if len(begun) > self._stream.prefetch:
                yield self._fill(*begun.popleft())

    def _opened(self, places: Iterator[Places]) -> Iterator[Places]:
        """Yield `places`, each batch's once all shards to be opened ahead of it are being opened."""
        enough = min(self._most_open // 2, sum(len(source.urls) for source in self._stream.sets))
        ahead: deque[tuple[Places, list[Shard]]] = deque()
        for batch in places:
            wanted = dict.fromkeys(zip(batch.sets.tolist(), batch.shards.tolist(), strict=True))
            ahead.append((batch, [self._shard(*shard) for shard in wanted]))
            while ahead and (len(self._shards) >= enough or batch.positions[0] >= ahead[0][0].positions[0] + _OPENED_AHEAD):
                yield ahead[0][0]
                ahead.popleft()

    def _begin(self, batch: Places) -> list[Block]:
        """Start reading the batch's blocks; return those of its samples `[B]`."""
        firsts = batch.rows - batch.rows % self._block_sizes[batch.sets]
        places = list(zip(batch.sets.tolist(), batch.shards.tolist(), firsts.tolist(), strict=True))
        distinct = {place: self._block(place) for place in dict.fromkeys(places)}
        blocks = [distinct[place] for place in places]
        lanes = batch.sets * self._lanes_of_set + batch.positions % self._lanes_of_set
        self._kept.update(zip(lanes.tolist(), blocks, strict=True))
        return blocks

    def _block(self, place: Place) -> Block:
        if (block := self._blocks.get(place)) is None:
            number, shard, first = place
            block = self._blocks[place] = Block(self._shard(number, shard), first, self._rows[number], self._readers)
        return block

    def _shard(self, number: int, shard_number: int) -> Shard:
        if (shard := self._shards.get((number, shard_number))) is None:
            source = self._stream.sets[number]
            if len(self._shards) >= self._most_open:
                raise UserError(
                    f"{source.name}: more than {self._most_open} shards must be open at once, which takes too many files for "
                    "one process; raise the limit (ulimit -n) or encode into larger shards."
                )
            cache_dir, verify = self._stream.cache_dir, self._stream.verify
            shard = Shard(source, shard_number, self._openers, self._patience, cache_dir, verify=verify)
            self._shards[number, shard_number] = shard
        return shard

    def _fill(self, places: Places, blocks: list[Block]) -> Batch:
        stream, rows = self._stream, places.rows.copy()
        batch: Batch = {
            name: torch.empty((len(blocks), *spec.shape), dtype=getattr(torch, spec.dtype), pin_memory=stream.pin_memory)
            for name, spec in stream.specs.items()
        }
        for tensor in batch.values() if len(stream.sets) > 1 else ():
            tensor.zero_()  # for members that a set lacks
        damaged = {block for block in dict.fromkeys(blocks) if block.errors}
        for slot in [slot for slot, block in enumerate(blocks) if block in damaged]:
            blocks[slot], rows[slot] = self._readable(int(places.sets[slot]), int(places.shards[slot]), int(rows[slot]))
        rows += np.array([block.at - block.first for block in blocks])
        keys = np.empty(len(blocks), object)
        for number in np.unique(places.sets).tolist():
            slots, memory = np.flatnonzero(places.sets == number), self._rows[number]
            chosen = rows[slots]
            keys[slots] = memory.keys[chosen]
            for name, values in memory.arrays.items():
                fits = values.shape[1:] == batch[name].shape[1:]
                tensor = batch[name] if fits else batch[name][:, : values.shape[1]]  # fewer targets than others
                if len(slots) == len(tensor):
                    torch.index_select(torch.from_numpy(values), 0, torch.from_numpy(chosen), out=tensor)
                else:
                    tensor.numpy()[slots] = values[chosen]
        index, source = torch.from_numpy(places.positions), torch.from_numpy(places.sets)
        return {**batch, "sample_index": index, "source": source, "key": keys.tolist()}

    def _readable(self, number: int, shard: int, row: int) -> tuple[Block, int]:
        """The block and row of the first readable sample from this one on: later rows, then later shards of its set."""
        source, stream = self._stream.sets[number], self._stream
        for _ in range(source.manifest.num_samples):
            block = self._block((number, shard, row - row % stream.sizes[number].block))
            self._kept[~number] = block
            if row not in block.errors:
                return block, row
            reason = f"sample {row} of {source.urls[shard]}: {block.errors[row]}"
            if (number, shard, row) not in stream.bad_places:
                stream.bad_places.add((number, shard, row))
                stream.bad_samples.append(reason)
                log.warning("unreadable: %s; another sample takes its place", reason)
            if (count := len(stream.bad_samples)) > stream.max_bad_samples:
                raise UserError(
                    f"{reason}; unreadable samples: {count}, dpt.data.max_bad_samples: {stream.max_bad_samples}; "
                    "encode the set again or raise the field."
                )
            row += 1
            if block.shard_lost or row == source.manifest.shards[shard].num_samples:
                shard, row = (shard + 1) % len(source.urls), 0
        raise UserError(f"{reason}; no sample of {source.name} can be read; encode the set again.")
