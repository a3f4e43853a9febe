"""Check that the GPU computes what the definitions say: experts, attention, and a training run's losses."""

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.gpu.training import release
from benchmarks.train_step import pretraining
from dpt.config.sections import ModelConfig
from dpt.models import grouped_mlp
from dpt.models.attention import attention
from dpt.models.grouped_mlp import ExpertWeights

LOSS_STEPS = 50
_BF16_ROUNDING = 2.0**-8


def measure() -> list[harness.Row]:
    """Rows with a relative `difference` and the `limit` that it must stay below; `passed` says whether it does."""
    return [
        _row("grouped experts against the per-expert loop, one expert empty", _experts(), 4 * _BF16_ROUNDING),
        _row("attention against softmax(q k) v in fp32", _attention(), 4 * _BF16_ROUNDING),
        _row(f"bf16 losses against fp32, {LOSS_STEPS} steps", _losses(), 0.02),
    ]


def _row(what: str, difference: float, limit: float) -> harness.Row:
    return {"case": "parity", "what": what, "difference": difference, "limit": limit, "passed": bool(difference <= limit)}


def _apart(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|, infinite if anything is not finite."""
    error = (ours.detach().double() - reference.detach().double()).norm() / reference.detach().double().norm()
    return float(error) if bool(error.isfinite()) else math.inf


def _experts(experts: int = 4, rows: int = 4096, size: int = 256, width: int = 512) -> float:
    device = harness.device()
    torch.manual_seed(0)
    counts = torch.tensor([rows // 2, 0, rows // 4, rows // 4], device=device)
    shapes = [(experts, 2 * width, size), (experts, size, width)]
    w_in, w_out = ((torch.randn(s, device=device) / math.sqrt(s[-1])).bfloat16().requires_grad_() for s in shapes)
    x = torch.randn(rows, size, device=device).bfloat16().requires_grad_()
    seed = torch.randn(rows, size, device=device).bfloat16()
    poison = torch.full_like(torch.cat([w_in.flatten(), w_out.flatten()]), float("nan"))
    del poison  # what the kernel leaves unwritten would now be seen
    out = grouped_mlp.grouped_mlp(x, ExpertWeights(w_in, None, w_out, None), counts, "swiglu")
    ours = [out, *torch.autograd.grad(out, (x, w_in, w_out), seed)]
    wide = [t.detach().double().requires_grad_() for t in (x, w_in, w_out)]
    parts = []
    for expert, part in enumerate(wide[0].split(counts.tolist())):
        gate, up = (part @ wide[1][expert].t()).chunk(2, dim=-1)
        parts.append((torch.nn.functional.silu(gate) * up) @ wide[2][expert].t())
    reference = torch.cat(parts)
    theirs = [reference, *torch.autograd.grad(reference, wide, seed.double())]
    if bool(ours[2][1].any()) or bool(ours[3][1].any()):
        return math.inf  # the empty expert must have no gradient
    return max(_apart(a, b) for a, b in zip(ours, theirs, strict=True))


def _attention() -> float:
    torch.manual_seed(0)
    shape = (4, 4, 256, 72) if torch.cuda.is_available() else (1, 2, 32, 8)
    q, k, v = (torch.randn(shape, device=harness.device()).bfloat16().requires_grad_() for _ in range(3))
    out = attention(q, k, v)
    seed = torch.randn_like(out)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    reference = (wide[0] @ wide[1].transpose(-1, -2) / math.sqrt(shape[-1])).softmax(-1) @ wide[2]
    ours = [out, *torch.autograd.grad(out, (q, k, v), seed)]
    theirs = [reference, *torch.autograd.grad(reference, wide, seed.double())]
    return max(_apart(a, b) for a, b in zip(ours, theirs, strict=True))


def _losses() -> float:
    """The largest relative difference between the losses (means over ten steps) of a small MoE in bf16 and in fp32."""
    sizes: dict[str, Any] = {"hidden_size": 128, "depth": 2, "num_heads": 4, "input_size": 16, "num_classes": 10}
    config = ModelConfig(**sizes, num_experts=4, shared_expert_width=128)
    steps = LOSS_STEPS if torch.cuda.is_available() else 10
    curves = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        training = pretraining(config, 32, precision, zero_stage=2)
        losses = []
        for number in range(steps):
            training.data["sample_index"] = torch.arange(32) + 32 * number
            losses.append(training.engine.accumulate(*training.prepare(training.data))[1])
            training.engine.step(1e-3)
        curves.append(torch.stack(losses).view(-1, 10).mean(dim=1))
        release(training)
    return float(((curves[1] - curves[0]) / curves[0]).abs().max())
