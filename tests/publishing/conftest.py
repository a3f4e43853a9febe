from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, Hub, used


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in of the hub, and a token that may write there."""
    with used(monkeypatch, tmp_path / "cache", TOKEN) as hub:
        yield hub
