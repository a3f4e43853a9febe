"""The order: a permutation of every epoch, computed at any place alone, fixed for good."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt.data.order import MAX_LANES, MixtureOrder, SetSize, num_lanes, permutation
from dpt.errors import UserError

counts_of_shards = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def locate(order: MixtureOrder, start: int, stop: int) -> list[tuple[int, int, int]]:
    return list(zip(*(values.tolist() for values in order.locate(np.arange(start, stop))), strict=True))


def mixture(counts: list[list[int]], weights: list[float], batch: int, seed: int, block: int = 3) -> MixtureOrder:
    return MixtureOrder([SetSize(counts=tuple(shards), block=block) for shards in counts], weights, num_lanes(batch), seed)


@given(counts_of_shards, st.integers(1, 300), st.integers(0, 2**63), st.integers(1, 10))
@settings(max_examples=50)
def test_every_sample_once_an_epoch(counts: list[int], batch: int, seed: int, block: int) -> None:
    order = mixture([counts], [], batch, seed, block)
    every = sorted((0, shard, row) for shard, count in enumerate(counts) for row in range(count))
    epochs = [locate(order, e * len(every), (e + 1) * len(every)) for e in range(3)]
    for places in epochs:
        assert sorted(places) == every
    if len(every) > 12:
        assert epochs[0] != epochs[1] != epochs[2]


@given(counts_of_shards, st.integers(1, 300), st.integers(0, 100), st.integers(1, 50))
@settings(max_examples=30)
def test_any_part_of_the_order_alone(counts: list[int], batch: int, start: int, length: int) -> None:
    def new() -> MixtureOrder:
        return mixture([counts, counts[::-1]], [], batch, 7)

    assert locate(new(), start, start + length) == locate(new(), 0, start + length)[start:]


@given(st.integers(1, 5000))
def test_lanes_divide_the_batch(batch: int) -> None:
    assert batch % num_lanes(batch) == 0
    assert 1 <= num_lanes(batch) <= MAX_LANES


def test_a_batch_mixes_many_shards() -> None:
    order = mixture([[100] * 64], [], 256, 0, block=16)
    assert len({shard for _, shard, _ in locate(order, 0, 256)}) == 64
    rows = [row for _, shard, row in locate(order, 0, 6400) if shard == 5]
    assert rows != sorted(rows)


def test_order_is_fixed_for_good() -> None:
    """Recorded once: a change of these numbers breaks the resumption of every run."""
    assert permutation(8, 1, 2).tolist() == PERMUTATION
    assert [(shard, row) for _, shard, row in locate(mixture([[3, 4, 2]], [], 4, 5), 0, 9)] == ORDER
    assert [place[0] for place in locate(mixture([[4], [2]], [], 2, 5), 0, 6)] == MIXTURE


PERMUTATION = [5, 6, 3, 2, 1, 0, 4, 7]
ORDER = [(2, 0), (0, 0), (1, 1), (1, 0), (2, 1), (0, 2), (1, 2), (1, 3), (0, 1)]
MIXTURE = [1, 0, 0, 0, 1, 0]


@given(st.lists(st.floats(0.05, 10.0), min_size=2, max_size=4), st.integers(0, 1000))
@settings(max_examples=6)
def test_mixture_keeps_to_its_weights(weights: list[float], seed: int) -> None:
    order = mixture([[5, 6]] * len(weights), weights, 64, seed)
    start = 65536 - 300  # over the end of a period
    places = locate(order, start, start + 600)
    found = Counter(place[0] for place in places)
    for number, weight in enumerate(weights):
        assert abs(found[number] - 600 * weight / sum(weights)) <= 4
    for number in range(len(weights)):
        seen = Counter(place[1:] for place in places if place[0] == number)
        times = [seen[shard, row] for shard, count in enumerate([5, 6]) for row in range(count)]
        assert max(times) - min(times) <= 2  # parts of an epoch at the start and at the end


def test_mixture_by_size_shows_every_sample_once() -> None:
    order = mixture([[5, 6], [100], [1]], [], 64, 3)
    assert len(set(locate(order, 0, 112))) == 112 == len(set(locate(order, 224, 336)))


def test_a_weight_too_small_is_refused() -> None:
    with pytest.raises(UserError, match="set 1 has weight 1e-09"):
        mixture([[5], [5]], [1.0, 1e-9], 8, 0)
