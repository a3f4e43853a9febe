"""GELU without a slow tanh, in chunks that stay in a CPU's cache.

The tanh approximation of GELU is x sigmoid(x (l + c x^2)), the same function: on CPUs tanh takes four times as long.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715 * _LINEAR
_CHUNK = 1 << 19
"""Numbers worked on at once."""


def serves(x: Tensor) -> bool:
    """Whether to compute x's GELU here; when compiling, the compiler fuses PyTorch's own."""
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.device.type == "cpu" and known and x.is_contiguous() and not torch.compiler.is_compiling()


def forward(hidden: Tensor) -> Tensor:
    """GELU, not differentiable."""
    result = torch.empty_like(hidden)
    for chunk, out in _chunks(hidden, result):
        x, y = chunk.float(), _float_space(out)
        torch.mul(x, x, out=y)
        y.mul_(_CUBIC).add_(_LINEAR).mul_(x).sigmoid_().mul_(x)
        out.copy_(y)
    return result


def backward(grad: Tensor, hidden: Tensor, *, again: bool = False) -> tuple[Tensor, Tensor | None]:
    """The gradient with respect to `hidden` and, if `again`, GELU of `hidden`, recomputed."""
    d_hidden = torch.empty_like(hidden)
    active = torch.empty_like(hidden) if again else None
    for chunk, d_y, out, again_out in _chunks(hidden, grad.contiguous(), d_hidden, d_hidden if active is None else active):
        x, d_x = chunk.float(), _float_space(out)
        torch.mul(x, x, out=d_x).mul_(_CUBIC).add_(_LINEAR)  # l + c x^2
        share = torch.mul(d_x, x).sigmoid_()
        d_x.mul_(3.0).sub_(2.0 * _LINEAR).mul_(x)  # x (l + 3 c x^2)
        d_x.addcmul_(d_x, share, value=-1.0)
        if again:
            torch.mul(x, share, out=again_out)
        torch.addcmul(share, share, d_x, out=d_x).mul_(d_y.float())  # sigmoid (1 + (1 - sigmoid) x (l + 3 c x^2))
        out.copy_(d_x)
    return d_hidden, active


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.view(-1).split(_CHUNK) for t in tensors), strict=True)


def _float_space(out: Tensor) -> Tensor:
    """Float32 space for a result to be copied to `out`: `out` itself if it is float32."""
    return out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
