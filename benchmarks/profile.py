"""Profile of a training step: time shares by kind of work, and the kernels that take longest.

python -m benchmarks.profile [--cases S/2 S/2-8E2A] [--batch 16] [--micro-batches 1] [--compile] [--kernels 15] [--json FILE]

Uses torch.profiler on the step that `benchmarks.train_step` measures, after three that are not recorded. On a GPU these are the
kernels' own times; "gaps" is the time that none runs between the first and the last.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.gpu.training import gaps
from benchmarks.train_step import model_config, ours
from dpt.config.sections import ModelConfig

KINDS = {
    "compiled passes": r"^triton_",
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|_grouped_mm|.*conv.*)$|gemm|cutlass|nvjet|splitKreduce",
    "attention": r"attention|flash|fmha|cudnn::fusion",
    "norms": r"layer_norm|LayerNorm",
    "activations": r"gelu|silu|softmax",
    "moving tokens": r"index|embedding|gather|scatter|[sS]ort|topk|TopK|repeat",
    "optimizer": r"adam|_foreach|lerp|multi_tensor_apply",
    "copies and zeros": r"copy|zero|fill|Fill|aten::_?(cat|clone|contiguous|empty.*|to|stack)$|CatArray|[Mm]emcpy|[Mm]emset",
    "elementwise": (
        r"aten::(add|sub|rsub|mul|div|neg|pow|exp|r?sqrt|addcmul|where|sum|mean|sin|cos|clamp|maximum|minimum|bitwise.*|__.*|"
        r"eq|ne|lt|le|gt|ge|erf.*|log.*|sigmoid.*|tanh)(_.*)?$|elementwise|reduce_kernel"
    ),
    "communication": r"c10d|gloo|nccl",
}
"""Kinds of work and their patterns; the first pattern found in a kernel's name counts."""


def kind_of(name: str) -> str:
    """Kind of work of an operator or kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def measure(case: str, config: ModelConfig, *, batch: int, precision: str, kernels: int, **settings: Any) -> list[harness.Row]:
    """Rows of kinds, then of the longest kernels: seconds and share of the total. `settings`: as of `train_step.Training`."""
    step = ours(config, batch, precision, **settings)
    cuda = torch.cuda.is_available()
    for _ in range(3 if cuda else 1):
        step()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    spent: dict[str, float] = {}
    events: list[Any] = [event for event in profiler.key_averages() if not event.key.startswith("Optimizer.step#")]
    for event in events:
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        spent[event.key] = spent.get(event.key, 0.0) + microseconds / 1e6
    calls = {event.key: event.count for event in events}
    total = sum(spent.values())
    by_kind: dict[str, float] = {}
    for name, seconds in spent.items():
        by_kind[kind_of(name)] = by_kind.get(kind_of(name), 0.0) + seconds
    if cuda:
        by_kind["gaps"] = gaps(profiler)
        total += by_kind["gaps"]
    label = f"{case} {precision}"
    results = [_row(label, kind, seconds, total) for kind, seconds in _longest(by_kind)]
    for name, seconds in _longest(spent)[:kernels]:
        results.append(_row(f"{label} kernels", name[:60], seconds, total) | {"calls": calls[name]})
    return results


def _longest(spent: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(spent.items(), key=lambda item: -item[1])


def _row(case: str, what: str, seconds: float, total: float) -> harness.Row:
    return {"case": case, "what": what, "median_s": seconds, "share": round(seconds / total, 4)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, rounds=1, batch=16)
    parser.add_argument("--micro-batches", type=int, default=1, help="a step's batch is split into (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--cases", nargs="+", default=["S/2", "S/2-8E2A"])
    parser.add_argument("--input-size", type=int, default=32, help="side of the latents (default: %(default)s)")
    parser.add_argument("--precision", default="bf16" if torch.cuda.is_available() else "fp32", choices=list(harness.DTYPES))
    parser.add_argument("--kernels", type=int, default=15, help="longest kernels listed (default: %(default)s)")
    arguments = parser.parse_args(argv)
    results: list[harness.Row] = []
    for case in arguments.cases:
        config = model_config(case, input_size=arguments.input_size)
        shown = {"batch": arguments.batch, "precision": arguments.precision, "kernels": arguments.kernels}
        settings = {"accumulation": arguments.micro_batches, "compile": arguments.compile}
        results += measure(case, config, **shown, **settings)
    harness.finish("profile", results, arguments)


if __name__ == "__main__":
    main()
