"""Shared parts of the benchmarks: interleaved timing, this machine's own ceilings, one table and JSON.

Everything that is compared is measured in turn (A B C A B C ...), so that a slow spell of the machine affects all; shares and
speed-ups are medians over rounds of the ratio within a round.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpt.cpu.settings import keep_freed_memory
from dpt.models.products import product_dtype

if not torch.cuda.is_available():
    keep_freed_memory()  # as the launchers do

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUND = "bound"
"""The ceiling, which cannot be beaten, timed like the rest."""
OURS = "ours"

Row = dict[str, Any]
"""One line of the results."""


# --- timing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each round."""

    wall: Sequence[float]
    processor: Sequence[float]
    """Processor seconds of all threads of this process, less affected by other programs; on a GPU, wall seconds."""

    def scaled(self, factor: float) -> "Timing":
        """Scale the measurement of a part (or of several repetitions)."""
        return Timing(wall=[t * factor for t in self.wall], processor=[t * factor for t in self.processor])


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_once(action: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of one call; on a GPU between two events."""
    if torch.cuda.is_available():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        action()
        end.record()
        torch.cuda.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
        return seconds, seconds
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - processor


def interleave(
    actions: Mapping[str, Callable[[], object]], rounds: int, *, warmup: int = 1, before: Callable[[], object] = lambda: None
) -> dict[str, Timing]:
    """Time all `actions` in turn, `rounds` times after `warmup` rounds; `before` is called before each, not timed."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for number in range(warmup + rounds):
        for name, action in actions.items():
            before()
            seconds = time_once(action)
            if number >= warmup:
                measured[name].append(seconds)
    return {n: Timing(wall=[w for w, _ in s], processor=[p for _, p in s]) for n, s in measured.items()}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of numerator / denominator."""
    return statistics.median(a / max(b, 1e-12) for a, b in zip(numerator, denominator, strict=True))


def rows(case: str, timings: Mapping[str, Timing], **figures: Mapping[str, float]) -> list[Row]:
    """A row for each measurement: median and quartiles of the wall time, median processor time, share of the `bound` reached,
    wall time as a multiple of `ours`; and further `figures` by their name and the measurement's."""
    result = []
    for name, timing in timings.items():
        row: Row = {"case": case, "what": name, "rounds": len(timing.wall)}
        row |= {"median_s": statistics.median(timing.wall), "processor_s": statistics.median(timing.processor)}
        row["low_s"], row["high_s"] = _quartiles(timing.wall)
        if BOUND in timings and name != BOUND:
            row["share_of_bound"] = ratio(timings[BOUND].wall, timing.wall)
            row["share_of_bound_processor"] = ratio(timings[BOUND].processor, timing.processor)
        if OURS in timings and name not in (BOUND, OURS):
            row["times_ours"] = ratio(timing.wall, timings[OURS].wall)
            row["times_ours_processor"] = ratio(timing.processor, timings[OURS].processor)
        row |= {figure: values[name] for figure, values in figures.items() if name in values}
        result.append(row)
    return result


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


# --- ceilings -----------------------------------------------------------------------------------------------------------


def linear_products(rows: int, inputs: int, outputs: int) -> list[tuple[str, int, int, int]]:
    """A linear layer's products on `rows` rows, as (layout, m, k, n): forward, gradients of its input and of its weight.

    The layouts are a linear layer's: "nt" multiplies by a transposed matrix, "tn" transposes the first.
    """
    return [("nt", rows, inputs, outputs), ("nn", rows, outputs, inputs), ("tn", outputs, rows, inputs)]


class MatrixProducts:
    """Runs the given products one after the other, into preallocated memory: what this machine can do at these shapes.

    On a processor without bf16 units, bf16 products are computed in fp32, which is faster there.
    """

    def __init__(self, products: Iterable[tuple[str, int, int, int]], dtype: torch.dtype) -> None:
        products = list(products)
        dtype = product_dtype(dtype, device())
        self.flops = sum(2.0 * m * k * n for _, m, k, n in products)
        self._operands = [self._allocate(product, dtype) for product in products]

    @staticmethod
    @cache
    def _allocate(product: tuple[str, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        layout, m, k, n = product
        first, second = (k, m) if layout[0] == "t" else (m, k), (n, k) if layout[1] == "t" else (k, n)
        a, b = (torch.randn(*shape, device=device()).to(dtype) for shape in (first, second))
        a, b = a.t() if layout[0] == "t" else a, b.t() if layout[1] == "t" else b
        return a, b, torch.empty(m, n, dtype=dtype, device=device())

    def __call__(self) -> None:
        for a, b, out in self._operands:
            torch.mm(a, b, out=out)


class Stream:
    """Adds one array to another: reads two, writes one, computes next to nothing. A measure of the machine's memory."""

    def __init__(self, numel: int) -> None:
        self.bytes = 12.0 * numel
        self._a, self._b = (torch.ones(numel, device=device()) for _ in range(2))

    def __call__(self) -> None:
        self._a.add_(self._b)


@cache
def matrix_rate(dtype: torch.dtype, size: int = 256, seconds: float = 0.3) -> float:
    """FLOP/s of square products, a quick look."""
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        best = min(best, time_once(lambda: a @ b)[0])
    return 2.0 * size**3 / best


def crawls(precision: str) -> str:
    """Reason why plain PyTorch takes minutes in this precision on this machine; empty if it does not."""
    rates = {name: matrix_rate(dtype) / 1e9 for name, dtype in DTYPES.items()}
    if rates[precision] >= 0.1 * rates["fp32"]:
        return ""
    return (
        f"{precision}: this processor has no units for it, and PyTorch's own small products reach {rates[precision]:.2g} "
        f"GFLOP/s ({rates['fp32']:.3g} in fp32). Ours convert to fp32, and the bound is that of fp32 without converting"
    )


def ways_to_measure(precision: str, asked: Sequence[str] | None, ways: Sequence[str], own: Sequence[str]) -> Sequence[str]:
    """The ways asked for; otherwise all, or our `own` where the others would take minutes per step."""
    if asked is not None:
        return asked
    return own if crawls(precision) else ways


# --- results ------------------------------------------------------------------------------------------------------------


def parser(doc: str | None, *, rounds: int = 5, **options: int | str) -> argparse.ArgumentParser:
    """A parser for the options that all benchmarks have, and for self-explanatory `options` with these defaults."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in options.items():
        flag = f"--{name.replace('_', '-')}"
        result.add_argument(flag, type=type(default), default=default, help="(default: %(default)s)")
    result.add_argument("--rounds", type=int, default=rounds, help="rounds of measurement (default: %(default)s)")
    result.add_argument("--json", type=Path, help="write the results here")
    return result


def machine() -> dict[str, Any]:
    """Description of the machine that the figures were measured on."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    found = {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def finish(name: str, results: Sequence[Row], arguments: argparse.Namespace, *, notes: Sequence[str] = ()) -> None:
    """Print the results as a table, and write them where `--json` says."""
    found = machine()
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    print(table(results))
    for note in notes:
        print(note)
    if arguments.json is not None:
        content = {"benchmark": name, "machine": found, "results": list(results), "notes": list(notes)}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "median_s": ("median", lambda v: _seconds(v)),
    "spread": ("spread", lambda v: f"{v:.0%}"),
    "processor_s": ("processor", lambda v: _seconds(v)),
    "share_of_bound": ("of bound", lambda v: f"{v:.2f}"),
    "share_of_bound_processor": ("(processor)", lambda v: f"{v:.2f}"),
    "times_ours": ("x ours", lambda v: f"{v:.2f}"),
    "times_ours_processor": ("(processor)", lambda v: f"{v:.2f}"),
    "peak_bytes": ("peak GiB", lambda v: f"{v / 2**30:.2f}"),
}


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms" if value >= 1e-3 else f"{1e6 * value:.0f} us"


def table(results: Sequence[Row]) -> str:
    """Results as text; the spread is that of the middle half of the rounds, as a share of the median."""
    shown = [row | ({"spread": (row["high_s"] - row["low_s"]) / row["median_s"]} if "low_s" in row else {}) for row in results]
    hidden = {"case", "what", "rounds", "low_s", "high_s", *_COLUMNS}
    further = dict.fromkeys(key for row in shown for key in row if key not in hidden)
    columns = {k: v for k, v in _COLUMNS.items() if any(k in row for row in shown)}
    columns |= {key: (key.replace("_", " "), _general) for key in further}
    lines = [["case", "what", *(title for title, _ in columns.values())]]
    for row in shown:
        lines.append([row["case"], row["what"], *(text(row[k]) if k in row else "" for k, (_, text) in columns.items())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _general(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
