"""Grouped MLP: the experts of a layer at once, each on its own contiguous rows, forward and backward.

Shape legend: N rows, D hidden_size, F MLP width, H columns of the first product (2 F for SwiGLU), E experts. Rows are sorted by
expert; `counts` [E] says how many each has, zeros included. Saved for the backward pass are the input and the first product;
the activation is recomputed.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpt.cpu.chunks import expert_chunks
from dpt.models import activations
from dpt.models.products import mm

Rows = Callable[[Tensor], None]
"""Receives the rows' gradient as soon as it exists, before the weights' gradients are computed."""


class ExpertWeights(NamedTuple):
    """Weights of E MLPs, in PyTorch's [out, in] orientation behind the first axis."""

    w_in: Tensor
    """[E, H, D]."""
    b_in: Tensor | None
    """[E, H]."""
    w_out: Tensor
    """[E, D, F]."""
    b_out: Tensor | None
    """[E, D]; present if `b_in` is."""


def grouped_mlp(x_ND: Tensor, weights: ExpertWeights, counts: Tensor, kind: activations.Kind) -> Tensor:
    """Rows sorted by expert [N, D], rows of each int64 [E] -> [N, D], differentiable.

    Uses grouped products where the device has a kernel for them (`has_grouped_products`): no host needs to know the counts, and
    torch.compile traces them. Elsewhere a loop over slices, which waits for the counts once, forward and backward together; on
    a CPU in chunks, so that only the first products of all rows are in memory at once.
    """
    apply = _apply if has_grouped_products(x_ND) else _apply_looped
    return apply(x_ND, weights, counts, kind)


def forward_pass(x_ND: Tensor, weights: ExpertWeights, counts: Tensor, kind: activations.Kind) -> tuple[Tensor, Tensor]:
    """The first products [N, H], which `backward_pass` needs, and the results [N, D]; not differentiable."""
    if has_grouped_products(x_ND):
        return _forward_grouped(x_ND, weights, counts, kind)
    return _forward_looped(x_ND, weights, counts.tolist(), kind)


def backward_pass(grad: Tensor, x: Tensor, hidden: Tensor, w_in: Tensor, w_out: Tensor, counts: Tensor,
                  kind: activations.Kind, biased: bool, on_rows: Rows) -> ExpertWeights:  # fmt: skip
    """Return the weights' gradients; pass the rows' to `on_rows`, so that it can travel while these are computed."""
    if has_grouped_products(x):
        return _backward_grouped(grad, x, hidden, w_in, w_out, counts, kind, biased, on_rows)[1]
    sizes = counts.tolist()
    rows = list(expert_chunks(sizes, w_in.shape[1], x))
    d_x, d_hidden, active = torch.empty_like(x), torch.empty_like(hidden), torch.empty_like(hidden[:, : w_out.shape[2]])
    for e, part, _ in rows:
        mm(grad[part], w_out[e], out=active[part])
        d_hidden[part], again = activations.backward(active[part], hidden[part], kind, again=True)
        assert again is not None
        active[part] = again
        mm(d_hidden[part], w_in[e], out=d_x[part])
    on_rows(d_x)
    d_w_in, d_w_out = torch.empty_like(w_in), torch.empty_like(w_out)
    for e, part in enumerate(_slices(sizes)):
        mm(grad[part].t(), active[part], out=d_w_out[e])
        mm(d_hidden[part].t(), x[part], out=d_w_in[e])
    d_b_in, d_b_out = (_sums(d_hidden, counts), _sums(grad, counts)) if biased else (None, None)
    return ExpertWeights(d_w_in, d_b_in, d_w_out, d_b_out)


def _slices(counts: list[int]) -> Iterator[slice]:
    start = 0
    for count in counts:
        yield slice(start, start + count)
        start += count


def has_grouped_products(x: Tensor) -> bool:
    """Whether `F.grouped_mm` has a kernel of its own for x: bf16 on Hopper and Blackwell; elsewhere it loops and waits."""
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def _apply(x: Tensor, weights: ExpertWeights, counts: Tensor | list[int], kind: activations.Kind) -> Tensor:
    result: Tensor = _GroupedMlp.apply(x, *weights, counts, kind)
    return result


@torch.compiler.disable
def _apply_looped(x: Tensor, weights: ExpertWeights, counts: Tensor, kind: activations.Kind) -> Tensor:
    return _apply(x, weights, counts.tolist(), kind)


class _GroupedMlp(torch.autograd.Function):
    """Uses grouped products if `counts` is a tensor, the loop if it is a list."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None,
                counts: Tensor | list[int], kind: activations.Kind) -> Tensor:  # fmt: skip
        weights = ExpertWeights(w_in, b_in, w_out, b_out)
        ctx.kind, ctx.biased = kind, b_in is not None
        if isinstance(counts, Tensor):
            hidden, out = _forward_grouped(x, weights, counts, kind)
            ctx.save_for_backward(x, hidden, w_in, w_out, counts)
        else:
            hidden, out = _forward_looped(x, weights, counts, kind)
            ctx.save_for_backward(x, hidden, w_in, w_out)
            ctx.counts = counts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, w_in, w_out, *counts = ctx.saved_tensors
        backward = _backward_grouped if counts else _backward_looped
        counts = counts[0] if counts else ctx.counts
        d_x, d_weights = backward(grad.contiguous(), x, hidden, w_in, w_out, counts, ctx.kind, ctx.biased)
        return d_x, *d_weights, None, None


# --- grouped ------------------------------------------------------------------------------------------------------------


def _forward_grouped(x: Tensor, weights: ExpertWeights, counts: Tensor, kind: activations.Kind) -> tuple[Tensor, Tensor]:
    """The first products [N, H] and the results [N, D]."""
    w_in, b_in, w_out, b_out = weights
    hidden = _product(x, w_in.transpose(1, 2), counts)
    if b_in is not None:
        hidden = hidden + b_in[_row_owners(counts, x.shape[0])]
    out = _product(activations.forward(hidden, kind), w_out.transpose(1, 2), counts)
    if b_out is not None:
        out = out + b_out[_row_owners(counts, x.shape[0])]
    return hidden, out


def _backward_grouped(grad: Tensor, x: Tensor, hidden: Tensor, w_in: Tensor, w_out: Tensor, counts: Tensor,
                      kind: activations.Kind, biased: bool,
                      on_rows: Rows | None = None) -> tuple[Tensor, ExpertWeights]:  # fmt: skip
    """Gradients of the rows and of the weights."""
    d_active = _product(grad, w_out, counts)
    d_hidden, active = activations.backward(d_active, hidden, kind, again=True)
    assert active is not None
    del d_active
    d_x = _product(d_hidden, w_in, counts)
    if on_rows is not None:
        on_rows(d_x)
    d_w_out = _outer(grad, active, counts)
    del active
    d_w_in = _outer(d_hidden, x, counts)
    d_b_in, d_b_out = (_sums(d_hidden, counts), _sums(grad, counts)) if biased else (None, None)
    return d_x, ExpertWeights(d_w_in, d_b_in, d_w_out, d_b_out)


def _product(x_NA: Tensor, w_EAB: Tensor, counts: Tensor) -> Tensor:
    """Rows of slice e times w[e]: [N, B]."""
    if not x_NA.shape[0]:  # the kernel does not accept this
        return x_NA.new_empty(0, w_EAB.shape[2])
    return F.grouped_mm(x_NA, w_EAB, offs=counts.cumsum(0, dtype=torch.int32))


def _outer(y_NB: Tensor, x_NA: Tensor, counts: Tensor) -> Tensor:
    """Sum of y x^T over each slice's rows, [E, B, A]; zero for an empty slice, which the kernel may leave unwritten."""
    if not x_NA.shape[0]:
        return x_NA.new_zeros(counts.shape[0], y_NB.shape[1], x_NA.shape[1])
    products = F.grouped_mm(y_NB.t(), x_NA, offs=counts.cumsum(0, dtype=torch.int32))
    return products.masked_fill_((counts == 0)[:, None, None], 0.0)


def _row_owners(counts: Tensor, num_rows: int) -> Tensor:
    """The slice of each row, int64 [N]."""
    return torch.searchsorted(counts.cumsum(0), torch.arange(num_rows, device=counts.device), right=True)


def _sums(y_NB: Tensor, counts: Tensor) -> Tensor:
    """Sum of each slice's rows, [E, B]: a product with a one-hot matrix, so deterministic."""
    experts = torch.arange(counts.shape[0], device=counts.device)
    return (experts[:, None] == _row_owners(counts, y_NB.shape[0])).to(y_NB.dtype) @ y_NB


# --- looped -------------------------------------------------------------------------------------------------------------


def _forward_looped(x: Tensor, weights: ExpertWeights, counts: list[int], kind: activations.Kind) -> tuple[Tensor, Tensor]:
    """Like `_forward_grouped`, with the loop."""
    w_in, b_in, w_out, b_out = weights
    hidden, out = x.new_empty(x.shape[0], w_in.shape[1]), x.new_empty(x.shape[0], w_out.shape[1])
    for e, rows, _ in expert_chunks(counts, w_in.shape[1], x):
        mm(x[rows], w_in[e].t(), out=hidden[rows])
        if b_in is not None:
            hidden[rows] += b_in[e]
        mm(activations.forward(hidden[rows], kind), w_out[e].t(), out=out[rows])
        if b_out is not None:
            out[rows] += b_out[e]
    return hidden, out


def _backward_looped(grad: Tensor, x: Tensor, hidden: Tensor, w_in: Tensor, w_out: Tensor, counts: list[int],
                     kind: activations.Kind, biased: bool) -> tuple[Tensor, ExpertWeights]:  # fmt: skip
    """Like `_backward_grouped`, with the loop."""
    d_x, d_w_in, d_w_out = torch.empty_like(x), torch.empty_like(w_in), torch.empty_like(w_out)
    d_b_in, d_b_out = w_in.new_zeros(w_in.shape[:2]), w_out.new_zeros(w_out.shape[:2])
    for e, rows, first in expert_chunks(counts, w_in.shape[1], x):
        d_active = torch.empty_like(hidden[rows, : w_out.shape[2]])
        mm(grad[rows], w_out[e], out=d_active)
        d_hidden, active = activations.backward(d_active, hidden[rows], kind, again=True)
        assert active is not None
        for total, y, inputs in ((d_w_out[e], grad[rows], active), (d_w_in[e], d_hidden, x[rows])):
            if first:
                mm(y.t(), inputs, out=total)
            else:
                total.addmm_(y.t(), inputs)
        mm(d_hidden, w_in[e], out=d_x[rows])
        if biased:
            d_b_in[e] += d_hidden.sum(dim=0)
            d_b_out[e] += grad[rows].sum(dim=0)
    return d_x, ExpertWeights(d_w_in, d_b_in if biased else None, d_w_out, d_b_out if biased else None)
