"""The order of the stream: the sample at each global position, as a pure stateless function.

An epoch lists every sample of a set once: the shards in a seeded order, each shard's blocks of neighbouring samples in
a seeded order, and each block's samples in a seeded order. (A block, about a megabyte, is read at once.) The list
is cut into lanes, and position p takes the next sample of lane p mod lanes: a batch mixes samples from as many places as
there are lanes, and a lane reads one shard after the other. The number of lanes divides the global batch size, so a rank,
which takes every `world_size`-th position, reads lanes of its own, in each set of a mixture.
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
    """`count` random uint64. A bit generator's raw output is the same in all numpy versions, unlike `Generator.permutation`."""
    return np.random.PCG64(np.random.SeedSequence([value & (2**64 - 1) for value in entropy])).random_raw(count)


def permutation(count: int, *entropy: int) -> np.ndarray:
    """A permutation of 0..count-1 determined by the integers `entropy`."""
    return np.argsort(_raw(count, *entropy), kind="stable")


@dataclass(frozen=True, kw_only=True)
class SetSize:
    """The inputs of the order: samples of each shard, and how many neighbouring samples are read at once."""

    counts: tuple[int, ...]
    block: int


class SetOrder:
    """The order of one set within a mixture.

    places: positions of the set's samples in the mixture's period, int64; None: everywhere (a single set). period: its length.
    entropy: seed and number of the set.
    """

    def __init__(self, size: SetSize, places: np.ndarray | None, period: int, lanes: int, *entropy: int) -> None:
        self.num_samples = sum(size.counts)
        self._counts, self._block, self._entropy = np.asarray(size.counts, np.int64), size.block, entropy
        self._share = period if places is None else len(places)
        self._lanes = np.arange(lanes)
        self._keys = None if places is None else np.sort(places % lanes * self._share + np.arange(self._share))
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._rows = lru_cache(maxsize=4 * lanes)(self._make_rows)

    def _passed(self, lanes: np.ndarray, counts: np.ndarray | int) -> np.ndarray:
        """How many of the set's first `counts` samples are in each of `lanes`."""
        periods, rest = np.divmod(counts, self._share)
        if self._keys is None:
            in_period, in_rest = ((n + len(self._lanes) - 1 - lanes) // len(self._lanes) for n in (self._share, rest))
        else:
            firsts = lanes * self._share
            none, whole, part = (np.searchsorted(self._keys, firsts + n) for n in (0, self._share, rest))
            in_period, in_rest = whole - none, part - none
        return np.asarray(periods * in_period + in_rest)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epoch's shards in order, where each begins in its list, and for each lane where in the list its samples begin,
        minus how many it had before the epoch."""
        shards = permutation(len(self._counts), *self._entropy, _SHARDS, epoch)
        before = self._passed(self._lanes, epoch * self.num_samples)
        own = self._passed(self._lanes, (epoch + 1) * self.num_samples) - before
        return shards, np.concatenate([[0], np.cumsum(self._counts[shards])]), np.cumsum(own) - own - before

    def _make_rows(self, epoch: int, shard: int) -> np.ndarray:
        """The shard's rows in the epoch's order: its blocks permuted, and the rows of each."""
        count = int(self._counts[shard])
        entropy = (*self._entropy, _SAMPLES, epoch, shard)
        blocks = np.argsort(permutation(-(-count // self._block), *entropy, 0), kind="stable")
        return np.lexsort((_raw(count, *entropy, 1), blocks[np.arange(count) // self._block]))

    def locate(self, counts: np.ndarray, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shards and rows of the set's samples number `counts` (int64, from 0 over all epochs), which are in `lanes`."""
        epochs = counts // self.num_samples
        shards, rows = np.empty_like(counts), np.empty_like(counts)
        for epoch in np.unique(epochs).tolist():
            order, starts, offsets = self._epoch(epoch)
            here = np.flatnonzero(epochs == epoch)
            listed = offsets[lanes[here]] + self._passed(lanes[here], counts[here])
            entry = np.searchsorted(starts, listed, "right") - 1
            shards[here] = order[entry]
            offset = listed - starts[entry]
            for one in np.unique(entry).tolist():
                those = entry == one
                rows[here[those]] = self._rows(epoch, int(order[one]))[offset[those]]
        return shards, rows


class MixtureOrder:
    """The order of several sets mixed by weight; for one set, simply its own.

    Positions form periods, in which each set has a fixed number of samples at fixed places, spread evenly with random
    offsets, so that every batch is close to the weights. Without weights a period is one epoch of all sets: every sample once
    (beyond 4 million samples in all: nearly so).

    `weights`: share of each set, any scale, empty for its number of samples.
    """

    def __init__(self, sizes: Sequence[SetSize], weights: Sequence[float], lanes: int, seed: int) -> None:
        totals = [sum(size.counts) for size in sizes]
        self.num_samples, self.lanes = sum(totals), lanes
        whole = _WEIGHT_RESOLUTION if weights else _LARGEST_SCHEDULE
        by_epoch = len(sizes) == 1 or (not weights and self.num_samples <= whole)
        self.period = self.num_samples if by_epoch else -(-whole // lanes) * lanes  # whole lanes: they keep to their ranks
        self.shares = _apportion(weights or totals, self.period)
        if len(sizes) == 1:
            self.sets = [SetOrder(sizes[0], None, self.period, lanes, seed, 0)]
            return
        numbers = [np.arange(share) for share in self.shares]
        jitter = _raw(self.period, seed, _MIXTURE, 0) * 2.0**-64
        order = np.argsort((np.concatenate(numbers) + jitter) / np.repeat(self.shares, self.shares), kind="stable")
        self._set = np.repeat(np.arange(len(sizes)), self.shares)[order]
        self._number = np.concatenate(numbers)[order]
        """At each place of the period: its set, and the index, from 0, of that set's sample in the period."""
        self.sets = [
            SetOrder(size, np.flatnonzero(self._set == number), self.period, lanes, seed, number)
            for number, size in enumerate(sizes)
        ]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Set, shard and row of each of the samples at `positions` (int64, from 0)."""
        periods, places = np.divmod(positions, self.period)
        lanes = places % self.lanes
        if len(self.sets) == 1:
            return np.zeros_like(positions), *self.sets[0].locate(positions, lanes)
        sets, shards, rows = self._set[places], np.empty_like(positions), np.empty_like(positions)
        for number, order in enumerate(self.sets):
            those = sets == number
            counts = periods[those] * self.shares[number] + self._number[places[those]]
            shards[those], rows[those] = order.locate(counts, lanes[those])
        return sets, shards, rows


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, as close to the weights as possible (largest remainders)."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]] += 1
    if shares.min() < 1:
        smallest = int(np.argmin(shares))
        raise UserError(
            f"dpt.data.weights: set {smallest} has weight {weights[smallest]}, too small beside the others; raise it."
        )
    return shares.tolist()
