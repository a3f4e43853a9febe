"""The activations of MLPs, keeping nothing for the backward pass but their input, in few passes over memory.

"gelu" (tanh-approximated): [..., F] -> [..., F]. "swiglu": silu(gate) * up of [gate, up] [..., 2 F] -> [..., F].
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpt.cpu import gelu

aten = torch.ops.aten

Kind = Literal["gelu", "swiglu"]


def activate(hidden: Tensor, kind: Kind) -> Tensor:
    """The activation, differentiable; keeps only `hidden` for the backward pass (autograd would keep SwiGLU's factors too)."""
    if torch.compiler.is_compiling():  # the compiler fuses better than we do
        return forward(hidden, kind)
    result: Tensor = _Activation.apply(hidden, kind)
    return result


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
    """The activation; differentiable only while compiled."""
    if kind == "gelu":
        return gelu.forward(hidden) if gelu.serves(hidden) else F.gelu(hidden, approximate="tanh")
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def backward(grad: Tensor, hidden: Tensor, kind: Kind, *, again: bool = False) -> tuple[Tensor, Tensor | None]:
    """The gradient with respect to `hidden` and, if `again`, the activation of `hidden`, recomputed."""
    if kind == "gelu":
        if gelu.serves(hidden):
            return gelu.backward(grad, hidden, again=again)
        d_hidden = aten.gelu_backward(grad, hidden, approximate="tanh")
        return d_hidden, forward(hidden, kind) if again else None
    gate, up = hidden.chunk(2, dim=-1)
    if torch.compiler.is_compiling():
        d_hidden = torch.cat([aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)
        return d_hidden, forward(hidden, kind) if again else None
    d_hidden = torch.empty_like(hidden)
    d_gate, d_up = d_hidden.chunk(2, dim=-1)
    torch.mul(grad, up, out=d_gate)
    aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    silu = F.silu(gate)
    torch.mul(grad, silu, out=d_up)
    return d_hidden, silu.mul_(up) if again else None
