"""The activations of MLPs, keeping nothing for the backward pass but their input, in few passes over memory.

"gelu" (tanh-approximated): [..., F] -> [..., F]. "swiglu": silu(gate) * up of [gate, up] [..., 2 F] -> [..., F].
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten

Kind = Literal["gelu", "swiglu"]

_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715 * _LINEAR
_CHUNK = 1 << 19
"""Numbers worked on at once, so that the passes over them stay in a CPU's cache."""


def activate(hidden: Tensor, kind: Kind) -> Tensor:
    """The activation, differentiable; it keeps `hidden` alone, where autograd would keep SwiGLU's factors too."""
    if torch.compiler.is_compiling():  # the compiler fuses better than we do
        return _plain(hidden, kind)
    result: Tensor = _Activation.apply(hidden, kind)
    return result


def _plain(hidden: Tensor, kind: Kind) -> Tensor:
    if kind == "gelu":
        return F.gelu(hidden, approximate="tanh")
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def _plain_backward(grad: Tensor, hidden: Tensor, kind: Kind) -> Tensor:
    if kind == "gelu":
        return aten.gelu_backward(grad, hidden, approximate="tanh")
    gate, up = hidden.chunk(2, dim=-1)
    return torch.cat([aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, kind: Kind) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.kind = kind
        return forward(hidden, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        return backward(grad, hidden, ctx.kind)[0], None


def forward(hidden: Tensor, kind: Kind) -> Tensor:
    """The activation, not differentiable."""
    if torch.compiler.is_compiling():
        return _plain(hidden, kind)
    if kind == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    if not _has_slow_tanh(hidden):
        return F.gelu(hidden, approximate="tanh")
    result = torch.empty_like(hidden)
    for narrow_x, out in _chunks(hidden, result):
        x, y = narrow_x.float(), _float_space(out)
        torch.mul(x, x, out=y)
        y.mul_(_CUBIC).add_(_LINEAR).mul_(x).sigmoid_().mul_(x)
        _store(y, out)
    return result


def backward(grad: Tensor, hidden: Tensor, kind: Kind, *, again: bool = False) -> tuple[Tensor, Tensor | None]:
    """The gradient with respect to `hidden`; and, if it is asked for, the activation of `hidden` `again`."""
    if torch.compiler.is_compiling():
        return _plain_backward(grad, hidden, kind), _plain(hidden, kind) if again else None
    d_hidden = torch.empty_like(hidden)
    if kind == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        d_gate, d_up = d_hidden.chunk(2, dim=-1)
        torch.mul(grad, up, out=d_gate)
        aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        silu = F.silu(gate)
        torch.mul(grad, silu, out=d_up)
        return d_hidden, silu.mul_(up) if again else None
    if not _has_slow_tanh(hidden):
        aten.gelu_backward.grad_input(grad, hidden, approximate="tanh", grad_input=d_hidden)
        return d_hidden, F.gelu(hidden, approximate="tanh") if again else None
    active = torch.empty_like(hidden) if again else None
    for narrow_x, d_y, out, again_out in _chunks(hidden, grad.contiguous(), d_hidden, d_hidden if active is None else active):
        x, d_x = narrow_x.float(), _float_space(out)
        torch.mul(x, x, out=d_x).mul_(_CUBIC).add_(_LINEAR)  # l + c x^2
        share = torch.mul(d_x, x).sigmoid_()
        d_x.mul_(3.0).sub_(2.0 * _LINEAR).mul_(x)  # x (l + 3 c x^2)
        d_x.addcmul_(d_x, share, value=-1.0)
        if again:
            torch.mul(x, share, out=again_out)
        torch.addcmul(share, share, d_x, out=d_x).mul_(d_y.float())  # sigmoid (1 + (1 - sigmoid) x (l + 3 c x^2))
        _store(d_x, out)
    return d_hidden, active


def _has_slow_tanh(x: Tensor) -> bool:
    """Whether to compute GELU as x sigmoid(x (l + c x^2)), the same function: on CPUs tanh takes four times as long."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.is_contiguous()


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.view(-1).split(_CHUNK) for t in tensors), strict=True)


def _float_space(out: Tensor) -> Tensor:
    """Where to compute what `out` shall hold, in float32: there itself if it is of that type."""
    return out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)


def _store(values: Tensor, out: Tensor) -> None:
    if values is not out:
        out.copy_(values)
