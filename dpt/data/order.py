"""The order of the stream: which sample stands at which global position, as a pure function without state.

An epoch lists every sample once: the shards in a seeded order, of each shard its blocks of neighbouring samples in a seeded
order, of each block its samples in a seeded order. (A block is what is read at once, about a megabyte.) The list is cut
into lanes, equal to within one sample, and position p of the epoch is the next sample of lane p mod lanes: a batch mixes
samples of as many places as there are lanes, and a lane reads one shard after the other. The number of lanes divides the
global batch size, so that a rank, and each of its workers, reads lanes of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dpt.errors import UserError

MAX_LANES = 64
_WEIGHT_RESOLUTION = 1 << 16
_LARGEST_SCHEDULE = 1 << 22
_SHARDS, _SAMPLES, _MIXTURE = range(3)


def num_lanes(global_batch_size: int) -> int:
    """The largest divisor of the global batch size that is at most MAX_LANES."""
    return next(lanes for lanes in range(min(MAX_LANES, global_batch_size), 0, -1) if global_batch_size % lanes == 0)


def _raw(count: int, *entropy: int) -> np.ndarray:
    """`count` random uint64. A bit generator's raw output is fixed across numpy's versions, unlike `Generator.permutation`."""
    return np.random.PCG64(np.random.SeedSequence([value & (2**64 - 1) for value in entropy])).random_raw(count)


def permutation(count: int, *entropy: int) -> np.ndarray:
    """A permutation of 0..count-1 that follows from the integers `entropy`."""
    return np.argsort(_raw(count, *entropy), kind="stable")


class SetOrder:
    """The order of one set.

    counts: samples of each shard; block: samples that are read at once; entropy: seed and number of the set.
    """

    def __init__(self, counts: Sequence[int], block: int, lanes: int, *entropy: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.num_samples = int(self.counts.sum())
        self._block, self._lanes, self._entropy = block, lanes, entropy
        lane = np.arange(lanes)
        self._lane_starts = lane * (self.num_samples // lanes) + np.minimum(lane, self.num_samples % lanes)
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._rows = lru_cache(maxsize=4 * lanes)(self._make_rows)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order, and where each begins in the epoch's list."""
        shards = permutation(len(self.counts), *self._entropy, _SHARDS, epoch)
        return shards, np.concatenate([[0], np.cumsum(self.counts[shards])])

    def _make_rows(self, epoch: int, shard: int) -> np.ndarray:
        """The shard's rows in the epoch's order: its blocks permuted, and the rows of each."""
        count = int(self.counts[shard])
        entropy = (*self._entropy, _SAMPLES, epoch, shard)
        blocks = np.argsort(permutation(-(-count // self._block), *entropy, 0), kind="stable")
        return np.lexsort((_raw(count, *entropy, 1), blocks[np.arange(count) // self._block]))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shards and rows of the samples at `positions` (int64, from 0 over all epochs)."""
        epochs = positions // self.num_samples
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            order, starts = self._epoch(epoch)
            here = np.flatnonzero(epochs == epoch)
            place = positions[here] - epoch * self.num_samples
            listed = self._lane_starts[place % self._lanes] + place // self._lanes
            entry = np.searchsorted(starts, listed, "right") - 1
            shards[here] = order[entry]
            offset = listed - starts[entry]
            for one in np.unique(entry).tolist():
                those = entry == one
                rows[here[those]] = self._rows(epoch, int(order[one]))[offset[those]]
        return shards, rows


@dataclass(frozen=True, kw_only=True)
class SetSize:
    """What the order depends on: samples of each shard, and how many neighbouring samples are read at once."""

    counts: tuple[int, ...]
    block: int


class MixtureOrder:
    """The order of several sets mixed by weight; of one set, simply its own.

    Positions come in periods with a fixed number of samples of each set, spread evenly with random offsets, so that every
    batch is close to the weights. Without weights a period is one epoch of all sets: every sample once (beyond 4 million
    samples in all: nearly so).

    `weights`: share of each set, any scale, empty for its number of samples.
    """

    def __init__(self, sizes: Sequence[SetSize], weights: Sequence[float], lanes: int, seed: int) -> None:
        self.sets = [SetOrder(size.counts, size.block, lanes, seed, number) for number, size in enumerate(sizes)]
        totals = [order.num_samples for order in self.sets]
        self.num_samples = sum(totals)
        self._seed, self.lanes = seed, lanes
        self._period = _WEIGHT_RESOLUTION if weights else min(self.num_samples, _LARGEST_SCHEDULE)
        self.shares = _apportion(weights or totals, self._period)
        self._schedule = lru_cache(maxsize=2)(self._make_schedule)

    def _make_schedule(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position of the period: its set, and the how-manieth sample of that set it is."""
        numbers = [np.arange(share) for share in self.shares]
        jitter = _raw(self._period, self._seed, _MIXTURE, period) * 2.0**-64
        keys = (np.concatenate(numbers) + jitter) / np.repeat(self.shares, self.shares)
        order = np.argsort(keys, kind="stable")
        sets = np.repeat(np.arange(len(self.sets)), self.shares)
        counted = np.concatenate([number + period * share for number, share in zip(numbers, self.shares, strict=True)])
        return sets[order], counted[order]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Set, shard and row of each of the samples at `positions` (int64, from 0)."""
        if len(self.sets) == 1:
            return np.zeros_like(positions), *self.sets[0].locate(positions)
        periods = positions // self._period
        sets, counted = np.empty_like(positions), np.empty_like(positions)
        for period in np.unique(periods).tolist():
            here = periods == period
            chosen, numbers = self._schedule(period)
            sets[here] = chosen[positions[here] - period * self._period]
            counted[here] = numbers[positions[here] - period * self._period]
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        for number, order in enumerate(self.sets):
            those = sets == number
            shards[those], rows[those] = order.locate(counted[those])
        return sets, shards, rows


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, as near to the weights as can be (largest remainders)."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]] += 1
    if shares.min() < 1:
        smallest = int(np.argmin(shares))
        raise UserError(
            f"dpt.data.weights: set {smallest} has weight {weights[smallest]}, too small beside the others; raise it."
        )
    return shares.tolist()
