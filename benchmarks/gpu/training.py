"""Whole training steps on one GPU: images per second, MFU, memory against the plan, and where the GPU waits for the host."""

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.train_step import Training, model_config, pretraining, recipe
from dpt.config.devices import data_sheet_peak
from dpt.config.recipe import Recipe, load_recipe
from dpt.config.sections import ModelConfig
from dpt.models.attention import can_use
from dpt.models.costs import macs, num_params
from dpt.models.experts import Dispatch
from dpt.training.preflight import needs

GLOBAL_BATCH = 256
MICRO_BATCHES = (256, 128, 64, 32, 16, 8)
CASES = {"dense": ("XL/2",), "moe": ("S/2-8E2A", "L/2-8E2A", "L/2-8E2A:16", "L/2-8E2A:12", "L/2-8E2A:8")}
TOO_LARGE = "skipped: it needs more memory than this GPU has free"
TOY = {"dense": ("a1:1",), "moe": ("S/2-8E2A:1",)}


def measure(kind: str, *, cases: Sequence[str] = (), rounds: int = 5) -> list[harness.Row]:
    """Rows of the dense or the MoE cases that fit, eager and compiled; MoE ones also with all tokens on two experts."""
    cuda = torch.cuda.is_available()
    rows: list[harness.Row] = []
    done: set[str] = set()
    for case in cases or (CASES if cuda else TOY)[kind]:
        preset = case.partition(":")[0]
        if preset in done:  # only a smaller fallback, and the larger one did fit
            continue
        config = model_config(case) if cuda else model_config(case, input_size=8)
        precision, batch = ("bf16", GLOBAL_BATCH) if cuda else ("fp32", 4)
        micro = fitting_micro_batch(config, batch, precision) if cuda else 2
        if micro is None:
            rows.append({"case": case, "what": TOO_LARGE})
            continue
        done.add(preset)
        large = num_params(config).total >= 1_000_000_000  # takes a minute to build
        if not large or not cuda:
            rows += _measure_one(case, config, batch, micro, precision, False, rounds)
        if cuda:
            rows += _measure_one(case, config, batch, micro, precision, True, rounds)
        if can_use("triton") and not large:
            rows += _measure_one(case, config, batch, micro, precision, True, rounds, attention="triton")
    return rows


def measure_recipe(stem: str, *, rounds: int = 5) -> list[harness.Row]:
    """A row of a shipped recipe's training on one GPU, in steps of the largest micro-batch that fits, otherwise as shipped."""
    toy = {"model.depth": 1, "model.hidden_size": 32, "model.num_heads": 2, "model.input_size": 8, "training.compile": False}
    smaller = {} if torch.cuda.is_available() else toy | {"bf16.enabled": False}

    def in_steps_of(micro: int) -> Recipe:
        sizes = {"train_batch_size": micro, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": 1}
        fields = {"training.output_dir": "", "training.weights": "", **sizes, **smaller}
        return load_recipe(f"ds_configs/{stem}.json", fields)

    micro = _largest_that_fits(in_steps_of) if torch.cuda.is_available() else 2
    if micro is None:
        return [{"case": stem, "what": TOO_LARGE}]
    training = Training(in_steps_of(micro))
    flops = 2.0 * micro * macs(training.network.config).training
    row = _row(f"{stem}, micro-batch {micro}", "as shipped", training, flops, rounds)
    row["plan_gib"] = needs(training.recipe, "finetune", 1).memory.total / 2**30
    release(training)
    return [row]


def fitting_micro_batch(config: ModelConfig, batch: int, precision: str) -> int | None:
    """The largest micro-batch whose plan fits into the free memory; None if none does."""
    return _largest_that_fits(lambda micro: recipe(config, batch, precision, zero_stage=2, accumulation=batch // micro))


def _largest_that_fits(recipe_of: Callable[[int], Recipe]) -> int | None:
    free = torch.cuda.mem_get_info()[0]
    return next((m for m in MICRO_BATCHES if needs(recipe_of(m), "pretrain", 1).memory.total < 0.92 * free), None)


def _measure_one(
    case: str, config: ModelConfig, batch: int, micro: int, precision: str, compile: bool, rounds: int, attention: str = "auto"
) -> list[harness.Row]:
    settings: dict[str, Any] = {"zero_stage": 2, "accumulation": batch // micro, "compile": compile}
    training = pretraining(config, batch, precision, attention=attention, **settings)
    flops = 2.0 * batch * macs(config).training
    name = ("compiled" if compile else "eager") + (f", attention by {attention}" if attention != "auto" else "")
    label = f"{case}, {precision}, micro-batch {micro}"
    rows = [_row(label, name, training, flops, rounds)]
    rows[0]["plan_gib"] = needs(training.recipe, "pretrain", 1).memory.total / 2**30
    if config.num_experts and (compile or not torch.cuda.is_available()):
        with torch.no_grad():
            for block in training.network.blocks:
                assert block.moe is not None
                block.moe.gate.weight.zero_()  # then the first two experts take all tokens
        rows.append(_row(label, f"{name}, two experts take all", training, flops, rounds))
        tokens = micro * (config.input_size // config.patch_size) ** 2
        dispatch = _dispatch_seconds(config, tokens, training.engine.dtype, rounds) * config.depth * training.accumulation
        rows[0]["dispatch_share"] = dispatch / rows[0]["median_s"]
    release(training)
    return rows


def release(training: Training) -> None:
    """Release the GPU's memory."""
    training.engine.deepspeed.destroy()
    del training.engine, training.network
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _row(case: str, what: str, training: Training, flops: float, rounds: int) -> harness.Row:
    if torch.cuda.is_available():
        training.data = {name: value.pin_memory() for name, value in training.data.items()}
    for _ in range(3):
        training.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    timing = harness.interleave({what: training.step}, rounds)
    row = harness.rows(case, timing)[0]
    row |= speed(flops, training.engine.global_batch_size, row["median_s"])
    if torch.cuda.is_available():
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["gpu_busy"] = kernel_seconds(training.step) / row["median_s"]
    return row


def speed(flops: float, images: int, seconds: float) -> harness.Row:
    """Images per second, MFU against the data sheet's peak where it is known, and the share of the measured matrix peak."""
    row: harness.Row = {"images_per_s": images / seconds}
    if torch.cuda.is_available():
        peak = data_sheet_peak(torch.cuda.get_device_name())
        row |= {"mfu": flops / seconds / peak} if peak else {}
        row["matrix_peak_share"] = flops / seconds / harness.matrix_rate(torch.bfloat16, 8192)
    return row


def kernel_seconds(action: Callable[[], object]) -> float:
    """Seconds in which a kernel runs on the GPU during one call: its wall time less the gaps."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    return _union(_intervals(profiler)) / 1e6


def gaps(profiler: Any) -> float:
    """Seconds without a running kernel between a profile's first kernel and its last."""
    intervals = list(_intervals(profiler))
    span = max(end for _, end in intervals) - min(start for start, _ in intervals)
    return (span - _union(iter(intervals))) / 1e6


def _intervals(profiler: Any) -> Iterator[tuple[float, float]]:
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Optimizer.step#"):
            yield event.time_range.start, event.time_range.end


def _union(intervals: Iterator[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _dispatch_seconds(config: ModelConfig, tokens: int, dtype: torch.dtype, rounds: int) -> float:
    """Seconds of one layer's dispatch alone, forward and backward: sorting, and moving tokens to their experts and back."""
    device = harness.device()
    x = torch.randn(tokens, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    experts = torch.rand(tokens, config.num_experts, device=device).topk(config.top_k).indices
    weights = torch.rand(tokens, config.top_k, device=device)

    def moves(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        dispatch = Dispatch(experts, config.num_experts)
        return dispatch.combine(dispatch.permute(x), weights)

    function = torch.compile(moves) if torch.cuda.is_available() else moves
    seed = torch.randn_like(x)

    def action() -> None:
        function(x, experts, weights).backward(seed)
        x.grad = None

    return statistics.median(harness.interleave({"dispatch": action}, rounds, warmup=3)["dispatch"].wall)
