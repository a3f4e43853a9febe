"""Timing in turn, ratios within rounds, ceilings' bookkeeping, peak memory, tables and JSON."""

import json

import pytest
import torch

from benchmarks import harness, memory
from benchmarks.harness import BOUND, OURS, Timing


def test_actions_are_timed_in_turn_after_a_warmup():
    calls = []
    actions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = harness.interleave(actions, 3, warmup=1, before=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b" * 4
    assert [len(t.wall) for t in timings.values()] == [3, 3]
    assert all(w >= 0 for t in timings.values() for w in [*t.wall, *t.processor])


def test_rows_hold_medians_of_ratios_within_rounds():
    """A machine that is ten times slower in one round changes no ratio."""
    timings = {
        BOUND: Timing(wall=[1, 10, 1], processor=[1, 1, 1]),
        OURS: Timing(wall=[2, 20, 2], processor=[2, 2, 2]),
        "other": Timing(wall=[6, 60, 6], processor=[4, 4, 4]),
    }
    bound, ours, other = harness.rows("case", timings, peak_bytes={OURS: 5.0})
    assert "share_of_bound" not in bound
    assert (ours["median_s"], ours["share_of_bound"], ours["peak_bytes"], ours["rounds"]) == (2, 0.5, 5.0, 3)
    assert "times_ours" not in ours
    assert (other["times_ours"], other["times_ours_processor"], other["share_of_bound_processor"]) == (3, 2, 0.25)
    assert ours["low_s"] <= ours["median_s"] <= ours["high_s"]


def test_a_part_is_scaled():
    assert Timing(wall=[1, 2], processor=[3]).scaled(2) == Timing(wall=[2, 4], processor=[6])


def test_the_products_are_those_of_a_linear_layer():
    products = harness.linear_products(6, 4, 5)
    bound = harness.MatrixProducts(products, torch.float32)
    assert bound.flops == 3 * 2 * 6 * 4 * 5
    bound()
    for (a, b, out), (layout, m, k, n) in zip(bound._operands, products, strict=True):
        assert (a.shape, b.shape) == ((m, k), (k, n))
        assert (a.is_contiguous(), b.is_contiguous()) == (layout[0] == "n", layout[1] == "n")
        torch.testing.assert_close(out, a @ b)


def test_plain_ways_that_take_minutes_are_left_out_unless_asked_for(monkeypatch):
    monkeypatch.setattr(harness, "matrix_rate", lambda dtype: 1e9 if dtype == torch.bfloat16 else 1e11)
    assert harness.crawls("bf16").startswith("bf16: this processor has no units")
    assert harness.crawls("fp32") == ""
    choices = {"ways": ["ours", "plain"], "own": ["ours"]}
    assert harness.ways_to_measure("bf16", None, **choices) == ["ours"]
    assert harness.ways_to_measure("fp32", None, **choices) == ["ours", "plain"]
    assert harness.ways_to_measure("bf16", ["plain"], **choices) == ["plain"]
    monkeypatch.setattr(harness, "matrix_rate", lambda dtype: 1e11)
    assert harness.crawls("bf16") == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have units for bf16")
def test_the_bound_of_bf16_without_units_is_that_of_fp32(monkeypatch):
    products = harness.linear_products(3, 4, 5)
    for narrow, expected in ((frozenset([torch.bfloat16]), torch.float32), (frozenset(), torch.bfloat16)):
        monkeypatch.setattr("dpt.cpu.upcast._UPCAST", narrow)
        bound = harness.MatrixProducts(products, torch.bfloat16)
        assert {t.dtype for operands in bound._operands for t in operands} == {expected}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted by the allocator there")
def test_peak_bytes_count_what_is_alive_at_once():
    def build():
        kept = torch.ones(100)

        def action():
            a = kept + 1
            b = a * 2
            del a
            return (b + 1).sum()

        return action

    assert memory.peak_bytes(build) == 3 * 400 or memory.peak_bytes(build) == 3 * 400 + 4


def test_results_are_printed_and_written(tmp_path, capsys):
    arguments = harness.parser(None).parse_args(["--json", str(tmp_path / "x.json")])
    timings = {BOUND: Timing(wall=[1.0], processor=[1.0]), OURS: Timing(wall=[2.0], processor=[2.0])}
    results = [row | {"extra": 7} for row in harness.rows("case", timings)]
    harness.finish("x", results, arguments, notes=["a note"])
    printed = capsys.readouterr().out
    assert "of bound" in printed
    assert "0.50" in printed
    assert "a note" in printed
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["benchmark"] == "x"
    assert written["results"] == results
    assert {"processor", "cores", "threads", "torch", "load"} <= set(written["machine"])
