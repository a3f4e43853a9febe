"""Numbers as people read them."""

import pytest

from dpt.scores import METRICS, readable, round_ticks, say, show, with_unit


def test_one_unit_everywhere():
    assert say("abs_rel", 0.0590) == "AbsRel 5.90 %"
    assert say("epe", 3.17) == "EPE 3.170 px"
    assert say("rmse", 0.51234) == "rmse 0.5123"
    assert with_unit("depth/hypersim_val/abs_rel", 0.0590) == "5.90 %"
    assert show("delta1", 0.956) == "95.6"
    assert METRICS["abs_rel_log_fit"].name == "AbsRel, log fit"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(1.3, 5.2, [2, 3, 4, 5]), (0, 30, [0, 10, 20, 30]), (0, 0.7, [0, 0.2, 0.4, 0.6]), (3.0, 3.0, [])],
)
def test_ticks_are_round(low, high, ticks):
    found = round_ticks(low, high)
    assert len(found) <= 5
    if ticks:
        assert found == pytest.approx(ticks)


def test_readable_numbers():
    assert [readable(v) for v in (0.30000000004, 12.345, 1999.6)] == ["0.3", "12.3", "2000"]
