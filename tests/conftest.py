"""What every test starts from."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: ranks are forked, which no pool of threads survives

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher() -> Iterator[None]:
    """No launcher's variables before a test, and none left behind by what it ran."""
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    yield
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
