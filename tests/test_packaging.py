"""What setup.py asks for is what the code needs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST_WITH = {"activate_flash_attention_impl": (2, 10), "grouped_mm": (2, 10)}
"""Functions of torch that the code calls, and the first release that has them."""


@pytest.mark.parametrize("function", FIRST_WITH)
def test_the_oldest_torch_that_is_allowed_has_what_is_called(function: str) -> None:
    (floor,) = re.findall(r'"torch>=(\d+)\.(\d+)"', (ROOT / "setup.py").read_text())
    assert tuple(map(int, floor)) >= FIRST_WITH[function]
    assert any(function in path.read_text() for path in (ROOT / "dpt").rglob("*.py"))
