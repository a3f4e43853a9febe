"""Experts on contiguous slices: many small MLPs as grouped matrix products, and the moves of tokens to them and back.

Shape legend: T tokens, K top-k, N routed slots (T K, fewer if some are dropped), D hidden_size, F expert width, E experts here.
Rows of the slots' tensors are sorted by expert; `counts` [E] says how many rows each expert has, none included. The autograd
functions keep as little as the backward pass can do with: an expert MLP keeps its input and the first product (the activation
is computed again), permutations keep indices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpt.models import activations


def grouped_linear(x_ND: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows of expert e times weight[e]^T: x [N, A], weight [E, B, A] -> [N, B].

    One grouped product on a GPU; on a CPU a loop over contiguous slices, which is faster there.
    """
    if x_ND.is_cuda and x_ND.shape[0]:  # the kernel takes no empty product
        return F.grouped_mm(x_ND, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
    out = x_ND.new_empty(x_ND.shape[0], weight.shape[1])
    start = 0
    for e, count in enumerate(counts.tolist()):
        torch.mm(x_ND[start : start + count], weight[e].t(), out=out[start : start + count])
        start += count
    return out


def grouped_outer(y_NB: Tensor, x_NA: Tensor, counts: Tensor) -> Tensor:
    """For each expert, the sum over its rows of y x^T: y [N, B], x [N, A] -> [E, B, A]; zero for an empty expert."""
    if x_NA.is_cuda and x_NA.shape[0]:
        return F.grouped_mm(y_NB.t(), x_NA, offs=counts.cumsum(0, dtype=torch.int32))
    out = x_NA.new_empty(counts.shape[0], y_NB.shape[1], x_NA.shape[1])
    start = 0
    for e, count in enumerate(counts.tolist()):
        torch.mm(y_NB[start : start + count].t(), x_NA[start : start + count], out=out[e])  # zeros if there are no rows
        start += count
    return out


def _row_experts(counts: Tensor, num_rows: int) -> Tensor:
    """The expert of each row, int64 [N]."""
    return torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts, output_size=num_rows)


def _grouped_sum(y_NB: Tensor, counts: Tensor) -> Tensor:
    """For each expert, the sum of its rows: y [N, B] -> [E, B]."""
    if y_NB.is_cuda:  # a product with a one-hot matrix: deterministic, and no host needs to know the counts
        return F.one_hot(_row_experts(counts, y_NB.shape[0]), counts.shape[0]).to(y_NB.dtype).t() @ y_NB
    return torch.stack([part.sum(dim=0) for part in y_NB.split(counts.tolist())])


class _ExpertMlp(torch.autograd.Function):
    """All experts' MLPs on their slices; x [N, D] -> [N, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None, counts: Tensor,
                kind: activations.Kind) -> Tensor:  # fmt: skip
        hidden = grouped_linear(x, w_in, counts)
        if b_in is not None:
            hidden += b_in[_row_experts(counts, x.shape[0])]
        out = grouped_linear(activations.forward(hidden, kind), w_out, counts)
        if b_out is not None:
            out += b_out[_row_experts(counts, x.shape[0])]
        ctx.save_for_backward(x, w_in, w_out, counts, hidden)
        ctx.kind, ctx.biased = kind, b_in is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, counts, hidden = ctx.saved_tensors
        grad = grad.contiguous()
        d_active = grouped_linear(grad, w_out.transpose(1, 2), counts)
        d_hidden, active = activations.backward(d_active, hidden, ctx.kind, again=True)
        assert active is not None
        del d_active
        d_w_out = grouped_outer(grad, active, counts)
        del active
        d_w_in = grouped_outer(d_hidden, x, counts)
        d_x = grouped_linear(d_hidden, w_in.transpose(1, 2), counts)
        d_b_in = _grouped_sum(d_hidden, counts) if ctx.biased else None
        d_b_out = _grouped_sum(grad, counts) if ctx.biased else None
        return d_x, d_w_in, d_b_in, d_w_out, d_b_out, None, None


class _Permute(torch.autograd.Function):
    """x [T, D] -> [N, D]: row n is token tokens[n]. Backward gathers by `slots` [T, K] instead of scattering."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, slots: Tensor, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(slots, kept)
        return x.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slots, kept = ctx.saved_tensors
        weights = None if kept is None else kept.to(grad.dtype)
        return F.embedding_bag(slots, grad.contiguous(), mode="sum", per_sample_weights=weights), None, None, None


class _Combine(torch.autograd.Function):
    """y [N, D], weights [T, K] -> [T, D]: each token's weighted sum over its slots, without a copy of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, tokens: Tensor, slots: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, tokens, order)
        return F.embedding_bag(slots, y, mode="sum", per_sample_weights=weights.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weights, tokens, order = ctx.saved_tensors
        d_y = grad.index_select(0, tokens)
        products = (d_y * y).sum(dim=-1, dtype=weights.dtype)
        d_weights = torch.zeros_like(weights).view(-1).index_copy_(0, order, products).view_as(weights)
        d_y *= weights.view(-1).index_select(0, order).to(d_y.dtype)[:, None]
        return d_y, d_weights, None, None, None


class Dispatch:
    """Where routed slots go: sorted by expert once, so that every expert's rows are one contiguous slice.

    `permute` takes tokens [T, D] to slots [N, D]; `combine` takes the experts' results back, weighted. A slot that is not
    `kept` reaches no expert and adds nothing.
    """

    def __init__(self, experts_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> None:
        flat = experts_TK.flatten()
        if kept_TK is not None:
            flat = torch.where(kept_TK.flatten(), flat, num_experts)  # dropped slots are sorted behind the last expert
        order = flat.argsort(stable=True)
        slots = torch.empty_like(order)
        slots[order] = torch.arange(order.shape[0], device=order.device)
        self.counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
        self.counts = self.counts.index_add_(0, flat, torch.ones_like(flat))[:num_experts]
        self.kept = kept_TK
        if kept_TK is not None:
            order = order[: int(self.counts.sum())]
            slots.clamp_(max=order.shape[0] - 1)  # any row will do: its weight is 0
        self.order = order  # [N], position of each row in the flattened [T, K]
        self.tokens = order // experts_TK.shape[1]  # [N]
        self.slots = slots.view_as(experts_TK)  # [T, K], row of each slot

    def permute(self, x_TD: Tensor) -> Tensor:
        return _Permute.apply(x_TD, self.tokens, self.slots, self.kept)

    def combine(self, y_ND: Tensor, weights_TK: Tensor) -> Tensor:
        if self.kept is not None:
            weights_TK = weights_TK * self.kept
        return _Combine.apply(y_ND, weights_TK, self.tokens, self.slots, self.order)


class Experts(nn.Module):
    """The experts held here, as stacked parameters, PyTorch's [out, in] orientation behind the expert axis.

    "swiglu": gate_up_weight [E, 2 F, D] (gate first), down_weight [E, D, F]. "gelu": fc1_weight [E, F, D], fc1_bias [E, F],
    fc2_weight [E, D, F], fc2_bias [E, D].
    """

    def __init__(self, num_experts: int, hidden_size: int, width: int, kind: activations.Kind) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.kind = kind
        if kind == "swiglu":
            self.gate_up_weight = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
            self.down_weight = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        else:
            self.fc1_weight = nn.Parameter(torch.empty(num_experts, width, hidden_size))
            self.fc1_bias = nn.Parameter(torch.empty(num_experts, width))
            self.fc2_weight = nn.Parameter(torch.empty(num_experts, hidden_size, width))
            self.fc2_bias = nn.Parameter(torch.empty(num_experts, hidden_size))

    def reset_parameters(self, first_expert: int = 0) -> None:
        """Xavier-uniform matrices, zero biases; each expert from a seed of its global id, so that ranks do not change it.

        `first_expert` is the global id of the first expert here. One draw of torch's generator seeds the layer.
        """
        seed = int(torch.randint(2**31, (), device="cpu"))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.zeros_(parameter)
        if next(self.parameters()).is_meta:
            return
        matrices = [self.gate_up_weight, self.down_weight] if self.kind == "swiglu" else [self.fc1_weight, self.fc2_weight]
        for expert in range(self.num_experts):
            generator = torch.Generator(matrices[0].device).manual_seed(seed * 2**20 + first_expert + expert)
            parts = matrices[0][expert].chunk(2 if self.kind == "swiglu" else 1)
            for weight in (*parts, matrices[1][expert]):
                nn.init.xavier_uniform_(weight, generator=generator)

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert [N, D], rows of each expert int64 [E] -> [N, D]. Autocast applies as to a linear layer."""
        if self.kind == "swiglu":
            arguments = (x_ND, self.gate_up_weight, None, self.down_weight, None)
        else:
            arguments = (x_ND, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)  # type: ignore[assignment]
        device = x_ND.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            arguments = tuple(None if a is None else a.to(dtype) for a in arguments)  # type: ignore[assignment]
        return _ExpertMlp.apply(*arguments, counts_E, self.kind)
