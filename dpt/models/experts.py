"""A layer's experts, and moving tokens to them and back.

Shape legend: T tokens, K top-k, N routed slots (T K, fewer if some are dropped), D hidden_size, F expert width, E experts here.
Rows of the slots' tensors are sorted by expert; `counts` [E] says how many rows each expert has, zeros included. The moves keep
indices for their backward passes, and gather in both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpt.models import activations
from dpt.models.grouped_mlp import ExpertWeights, grouped_mlp


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
        return _sum_of_slots(grad.contiguous(), slots, kept), None, None, None


class _Combine(torch.autograd.Function):
    """y [N, D], weights [T, K] -> [T, D]: each token's weighted sum over its slots. Saves y itself, no copy of it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, tokens: Tensor, slots: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, tokens, slots, order)
        return _sum_of_slots(y, slots, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weights, tokens, slots, order = ctx.saved_tensors
        d_y = grad.index_select(0, tokens)
        if y.is_cuda or torch.compiler.is_compiling():
            of_slots = y.index_select(0, slots.flatten()).view(*slots.shape, -1)
            d_weights = (grad.unsqueeze(1) * of_slots).sum(dim=-1, dtype=weights.dtype)
        else:
            products = (d_y * y).sum(dim=-1, dtype=weights.dtype)
            d_weights = torch.zeros_like(weights).view(-1).index_copy_(0, order, products).view_as(weights)
        d_y = d_y * weights.reshape(-1).index_select(0, order).to(d_y.dtype)[:, None]
        return d_y, d_weights, None, None, None


def _sum_of_slots(rows_ND: Tensor, slots_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Each token's weighted sum over its slots' rows, [T, D]. One kernel when compiled; embedding_bag on CPUs."""
    weights = None if weights_TK is None else weights_TK.to(rows_ND.dtype)
    if not rows_ND.is_cuda and not torch.compiler.is_compiling():
        return F.embedding_bag(slots_TK, rows_ND, mode="sum", per_sample_weights=weights)
    rows_TKD = rows_ND.index_select(0, slots_TK.flatten()).view(*slots_TK.shape, -1)
    return (rows_TKD if weights is None else rows_TKD * weights.unsqueeze(-1)).sum(dim=1)


class Dispatch:
    """Destinations of routed slots: sorted by expert once, so that every expert's rows are one contiguous slice.

    `permute` takes tokens [T, D] to slots [N, D]; `combine` takes the experts' results back, weighted. A slot that is not
    `kept` reaches no expert and adds nothing.
    """

    def __init__(self, experts_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> None:
        flat = experts_TK.flatten()
        if kept_TK is not None:
            flat = torch.where(kept_TK.flatten(), flat, num_experts)  # dropped slots are sorted behind the last expert
        # 16 bits are enough for any number of experts, and a GPU sorts them in a quarter of the passes.
        by_expert, order = flat.to(torch.int16).sort(stable=True)
        slots = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        ends = torch.searchsorted(by_expert, torch.arange(num_experts, device=flat.device, dtype=torch.int16), right=True)
        self.counts = torch.diff(ends, prepend=ends.new_zeros(1))
        self.kept = kept_TK
        if kept_TK is not None:
            order = order[: int(ends[-1])]
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
    """The experts held on this rank as stacked parameters, in PyTorch's [out, in] orientation behind the expert axis.

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
        """Xavier-uniform matrices, zero biases; each expert is seeded by its global id, so ranks do not change it.

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

    @property
    def weights(self) -> ExpertWeights:
        """The parameters as `grouped_mlp` takes them."""
        if self.kind == "swiglu":
            return ExpertWeights(self.gate_up_weight, None, self.down_weight, None)
        return ExpertWeights(self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert [N, D], rows of each expert int64 [E] -> [N, D]. Autocast applies as to a linear layer."""
        return grouped_mlp(*self.cast(x_ND), counts_E, self.kind)

    def cast(self, x_ND: Tensor) -> tuple[Tensor, ExpertWeights]:
        """Rows and weights in the dtype they are multiplied in: autocast's, if it is on."""
        weights = self.weights
        device = x_ND.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x_ND, weights = x_ND.to(dtype), ExpertWeights(*(None if w is None else w.to(dtype) for w in weights))  # type: ignore[arg-type]
        return x_ND, weights
