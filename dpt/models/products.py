"""Matrix products, also of bf16 and fp16 numbers on processors that have no units for these.

There PyTorch's own products of them are up to a hundred times slower than those of float32, so the numbers are converted,
multiplied in float32 and the result rounded once: what units for bf16 compute too. Arrays that are kept for a backward pass
stay narrow.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def _lacks_units() -> frozenset[torch.dtype]:
    """The types of 16 bits that this processor cannot multiply itself."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    available = torch.backends.mkldnn.is_available()
    return frozenset(t for t, name in checks.items() if available and not getattr(torch.ops.mkldnn, name)())


_WIDENED = _lacks_units()


def is_widened(x: Tensor) -> bool:
    """Whether products of x are computed in float32, from converted numbers."""
    return x.dtype in _WIDENED and x.device.type == "cpu"


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which products of `dtype` are computed on a device: what its speed is to be measured in."""
    return torch.float32 if is_widened(torch.empty(0, dtype=dtype, device=device)) else dtype


class Linear(nn.Linear):
    """nn.Linear, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., A] times weight [B, A] transposed, plus bias [B]: [..., B] in x's dtype."""
    if not is_widened(x):
        return F.linear(x, weight, bias)
    result: Tensor = _WidenedLinear.apply(x, weight, bias)
    return result


class _WidenedLinear(torch.autograd.Function):
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


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a [N, A] times b [A, B] into out [N, B], not differentiable."""
    if is_widened(a):
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


def baddbmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """bias [S, 1, B] plus a [S, N, A] times b [S, A, B], for each of S samples: [S, N, B]."""
    if is_widened(a):
        return torch.baddbmm(bias.float(), a.float(), b.float()).to(a.dtype)
    return torch.baddbmm(bias, a, b)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v by PyTorch's kernels; q, k, v and the result [B, heads, T, d]; `scale` None: 1 / sqrt(d)."""
    if not is_widened(q):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    result: Tensor = _WidenedAttention.apply(q, k, v, scale)
    return result


class _WidenedAttention(torch.autograd.Function):
    """A function of its own rather than hooks on what is saved, which would hide it from activation checkpointing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        ctx.scale = scale
        wide, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(q.float(), k.float(), v.float(), scale=scale)
        out: Tensor = wide.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *narrow, log_sums = ctx.saved_tensors
        wide = [t.float() for t in (grad, *narrow)]
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = backward(*wide, log_sums, 0.0, False, scale=ctx.scale)
        return *(t.to(grad.dtype) for t in gradients), None
