"""A run's records, every few steps: one line on the console, one in `records.jsonl`, and metrics for MLflow."""

import json
import math
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpt import distributed
from dpt.config.devices import data_sheet_peak
from dpt.config.recipe import Recipe
from dpt.models.costs import Macs
from dpt.models.products import product_dtype
from dpt.tracking import Run
from dpt.training.engine import Engine, StepResult
from dpt.training.step import Losses

_LOSSES = {
    "loss": "loss",
    "mse": "mse",
    "vlb": "vlb",
    "load_balancing_loss": "balance",
    "router_z_loss": "z",
    "dropped_share": "dropped_share",
    "pixel_loss": "pixel",
    "self_alignment_loss": "self_alignment",
    "feature_alignment_loss": "feature_alignment",
}
"""Fields of `Losses`, by record name."""


def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of this device's best large matrix product in `dtype`, the base of `perf/matrix_peak_share`.

    Measured, not taken from a data sheet; on a CPU by its threads' processor time, which other programs change less, and by all
    ranks at the same time, so each gets its part of the machine.
    """
    on_gpu, dtype = device.type == "cuda", product_dtype(dtype, device)
    size = 8192 if on_gpu else 1024 if dtype == torch.float32 else 256
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    clock, threads = (time.perf_counter, 1) if on_gpu else (time.process_time, torch.get_num_threads())
    best = math.inf
    a @ b
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        if on_gpu:
            torch.cuda.synchronize()
        begin = clock()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, (clock() - begin) / threads)
    return 2 * size**3 / best


def data_sheet_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s by the data sheet of a known GPU, the base of MFU; None on CPUs and in fp32."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return data_sheet_peak(torch.cuda.get_device_name(device), precision)


class StepSums:
    """Sums over the micro-batches since the last record; kept on the device until read."""

    def __init__(self) -> None:
        self.losses: Any = 0.0
        self.tokens_per_expert: Any = 0
        self.router_entropy: Any = 0.0
        self.micro_batches = 0

    def add(self, losses: Losses) -> None:
        """Add a micro-batch's losses."""
        self.losses = self.losses + torch.stack([getattr(losses, name).float() for name in _LOSSES.values()])
        self.tokens_per_expert = self.tokens_per_expert + losses.tokens_per_expert
        self.router_entropy = self.router_entropy + losses.router_entropy
        self.micro_batches += 1

    def means(self) -> dict[str, float]:
        """This rank's mean losses, by record name."""
        values = (self.losses.double() / self.micro_batches).tolist()
        return {f"train/{name}": value for name, value in zip(_LOSSES, values, strict=True)}

    def experts(self) -> dict[str, float]:
        """Lowest and highest load of an expert in any layer, in units of the mean, and each layer's mean entropy of a token's
        router probabilities, over log E; empty for dense models."""
        if not self.tokens_per_expert.numel():
            return {}
        loads = self.tokens_per_expert.double().cpu()
        loads = loads / loads.mean(dim=1, keepdim=True)
        scale = self.micro_batches * (math.log(loads.shape[1]) or 1.0)
        return {
            "experts/min_load": float(loads.min()),
            "experts/max_load": float(loads.max()),
            **{f"experts/router_entropy/layer_{n:02d}": e / scale for n, e in enumerate(self.router_entropy.tolist())},
        }


class Recorder:
    """Collects metrics since the last record, and writes them every `dpt.training.log_every` steps."""

    def __init__(self, recipe: Recipe, engine: Engine, run: Run, macs: Macs, output_dir: Path, step: int) -> None:
        """`macs`: of one sample. `step`: steps already done."""
        config = recipe.dpt
        self.run, self.steps, self.every = run, config.training.steps, config.training.log_every
        self.global_batch_size, self.macs = engine.global_batch_size, macs
        self.matrix_flops = measure_peak_flops(engine.device, engine.dtype)
        self.data_sheet_flops = data_sheet_flops(engine.device, recipe.precision)
        weights = {
            "pixel_loss": config.pixel_loss.weight,
            "self_alignment_loss": config.training.self_alignment.weight,
            "feature_alignment_loss": config.training.feature_alignment.weight,
            **dict.fromkeys(("load_balancing_loss", "router_z_loss", "dropped_share"), config.model.num_experts),
        }
        self.unused = {f"train/{name}" for name, weight in weights.items() if not weight}
        self.noted: dict[str, float] = {}
        self.path = output_dir / "records.jsonl"
        if distributed.is_main():
            output_dir.mkdir(parents=True, exist_ok=True)
            _cut_records(self.path, step)
        self._begin()

    def _begin(self) -> None:
        self.sums = StepSums()
        self.done = 0
        self.waited = self.left_out = 0.0
        self.started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude time spent on something other than training (pictures, saving)."""
        begin = time.perf_counter()
        yield
        self.left_out += time.perf_counter() - begin

    def wait(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self.waited += seconds

    def note(self, metrics: Mapping[str, float]) -> None:
        """Note metrics of the step that ends with the next `step_done`; they are recorded whether or not the others are."""
        self.noted |= metrics

    def note_start(self, metrics: Mapping[str, float]) -> None:
        """Send metrics of the weights that training starts from to MLflow."""
        if metrics and distributed.is_main():
            self.run.log_metrics(dict(metrics), 0)

    def step_done(
        self, step: int, result: StepResult, lr: float, *, skipped_steps: int, samples_seen: int, skipped_samples: int
    ) -> None:
        """Write a record if due after optimizer step number `step` (1 is the first). Collective."""
        self.done += 1
        noted, self.noted = self.noted, {}
        if step % self.every and step != self.steps and step != 1:
            if noted and distributed.is_main():
                self._keep(step, noted)
            return
        elapsed = max(time.perf_counter() - self.started - self.left_out, 1e-9)
        means = distributed.all_reduce_mean({**self.sums.means(), "wait": self.waited / elapsed})
        rate = self.done * self.global_batch_size / elapsed
        flops = 2 * self.macs.training * rate
        metrics = {
            **{name: value for name, value in means.items() if name.startswith("train/") and name not in self.unused},
            "train/grad_norm": result.grad_norm,
            "train/learning_rate": lr,
            "train/skipped_steps": float(skipped_steps),
            "train/samples_seen": float(samples_seen),
            "train/skipped_samples": float(skipped_samples),
            "perf/samples_per_second": rate,
            "perf/matrix_peak_share": flops / (self.matrix_flops * distributed.world_size()),
            "perf/data_wait": means["wait"],
            "perf/memory_gib": _peak_memory() / 2**30,
            "compute/forward_macs": float(self.macs.forward),
            "compute/train_macs": float(self.macs.training) * samples_seen,
            **self.sums.experts(),
            **noted,
        }
        if self.data_sheet_flops:
            metrics["perf/mfu"] = flops / (self.data_sheet_flops * distributed.world_size())
        if distributed.is_main():
            self._keep(step, metrics)
            distributed.log(_line(step, self.steps, metrics, (self.steps - step) * elapsed / self.done))
        self._begin()

    def _keep(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record in MLflow and on disk."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.run.log_metrics(finite, step)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **dict.fromkeys(metrics), **finite}) + "\n")  # JSON has null, but no NaN
        except OSError as error:  # a full disk costs records, not the run
            distributed.log(f"{self.path}: the record of step {step} was not written ({error.strerror}).")


def _line(step: int, steps: int, m: Mapping[str, float], seconds_left: float) -> str:
    parts = [f"step {step}/{steps}", f"loss {m['train/loss']:.4f}"]
    if "train/load_balancing_loss" in m:
        parts.append(f"balance {m['train/load_balancing_loss']:.3f}")
    parts += [
        f"grad norm {m['train/grad_norm']:.3g}",
        f"lr {m['train/learning_rate']:.2e}",
        f"{m['perf/samples_per_second']:.1f} samples/s",
        f"MFU {m['perf/mfu']:.0%}" if "perf/mfu" in m else f"{m['perf/matrix_peak_share']:.0%} of matrix peak",
        f"data wait {m['perf/data_wait']:.0%}",
        f"{m['perf/memory_gib']:.2f} GiB",
    ]
    if "experts/max_load" in m:
        parts.append(f"expert load {m['experts/min_load']:.2f}-{m['experts/max_load']:.2f}")
    if "experts/distance" in m:
        parts.append(f"expert distance {m['experts/distance']:.3g}")
    minutes, seconds = divmod(round(seconds_left), 60)
    return " | ".join([*parts, f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"])


def _peak_memory() -> int:
    """Peak of this rank's GPU memory since the start, or of its process's memory, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cut_records(path: Path, step: int) -> None:
    """Drop records past the step that the run resumes from, which will be written again."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _step(line: str) -> float:
    try:
        content: Any = json.loads(line)
        return float(content["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a kill cut off
