from pathlib import Path

import pytest

from tests.evaluation.tiny import make_set


@pytest.fixture
def depth_set(tmp_path: Path) -> Path:
    return make_set(tmp_path / "depth_val")
