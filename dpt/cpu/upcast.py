"""Products of bf16 and fp16 numbers, by upcasting, on processors without units for them.

There PyTorch's own products are up to a hundred times slower than those of float32, so the numbers are converted,
multiplied in float32 and the result rounded once: what units for bf16 compute too. Arrays that are kept for a backward pass
stay in 16 bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def _lacks_units() -> frozenset[torch.dtype]:
    """The 16-bit dtypes that this processor cannot multiply natively."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    available = torch.backends.mkldnn.is_available()
    return frozenset(t for t, name in checks.items() if available and not getattr(torch.ops.mkldnn, name)())


_UPCAST = _lacks_units()


def needs_upcast(x: Tensor) -> bool:
    """Whether products of x are computed in float32, from converted numbers."""
    return x.dtype in _UPCAST and x.device.type == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Like `F.linear`."""
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2).float()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_x = (rows @ weight.float()).view_as(x).to(x.dtype) if needs_x else None
        d_weight = (rows.t() @ x.flatten(0, -2).float()).to(weight.dtype) if needs_weight else None
        return d_x, d_weight, rows.sum(dim=0).to(weight.dtype) if needs_bias else None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Like `F.scaled_dot_product_attention`."""
    result: Tensor = _Attention.apply(q, k, v, scale)
    return result


class _Attention(torch.autograd.Function):
    """A custom function rather than hooks on saved tensors, which would hide it from activation checkpointing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        ctx.scale = scale
        upcast, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(q.float(), k.float(), v.float(), scale=scale)
        out: Tensor = upcast.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, log_sums = ctx.saved_tensors
        upcast = [t.float() for t in (grad, *kept)]
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = backward(*upcast, log_sums, 0.0, False, scale=ctx.scale)
        return *(t.to(grad.dtype) for t in gradients), None
