"""Small shard folders for the tests of the stream and of the formats."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from tests.shards import write_set

settings.register_profile("dpt", deadline=None, derandomize=True)  # shared machines are slow now and then
settings.load_profile("dpt")

MakeShards = Callable[..., Path]


def class_sample(number: int, side: int = 4) -> dict[str, np.ndarray]:
    """A sample whose every value follows from its number."""
    latents = np.full((2, 4, side, side), number % 1024, np.float16)
    latents[1] = -number % 1024
    return {"latents": latents, "label": np.array(number, np.int64)}


@pytest.fixture(scope="session")
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> MakeShards:
    """Returns a function: counts per shard (and manifest fields) -> a new folder of class shards."""

    def make(counts: Sequence[int], sample: Callable[[int], dict[str, np.ndarray]] = class_sample, **fields: Any) -> Path:
        return write_set(tmp_path_factory.mktemp("shards"), counts, sample, **fields)

    return make


@pytest.fixture
def folder(make_shards: MakeShards) -> Path:
    """Three shards of ten samples each."""
    return make_shards([10, 10, 10])
