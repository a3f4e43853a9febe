"""Upcycling: a dense network's weights become those of a Mixture-of-Experts, by default one that computes the same."""

import dataclasses
import math
import re

import torch
from torch import Tensor

from dpt.config.sections import UpcyclingConfig
from dpt.errors import UserError
from dpt.models.weights import Weights, check_state, expected_shapes

_REDRAW_SEED = 1 << 32
"""Keeps the random numbers of reinitialised units apart from those of routers and noise, which use `seed` alone."""


def upcycle(weights: Weights, upcycling: UpcyclingConfig, *, seed: int = 0) -> Weights:
    """Copy each MLP into experts and add a router (Komatsuzaki et al., "Sparse Upcycling", 2023; section 4.4 of the paper).

    With normalised top-k weights every token gets a convex combination of equal experts: exactly the dense function. With raw
    ones it is that function times the sum of the top-k probabilities. With granularity m each copy's hidden units are dealt
    to m finer experts that share a router row, so that they are chosen together; their second layers count m-fold, since each
    gets an m-th of the weight (virtual groups, He et al., "Upcycling Large Language Models into Mixture of Experts", 2024,
    section 4).

    `reinit_share` reinitialises that share of each expert's hidden units, each expert's own: their rows of the first layer,
    entries of its bias and columns of the second, normal with the mean and standard deviation of the values that they replace
    (Nakamura et al., "Drop-Upcycling", 2025, section 3). `noise_std`, times each tensor's standard deviation, is added to the
    copies. Both make experts different, at the price of exactness.

    Routers start uniform in +-1 / sqrt(hidden_size), with muP over the root of its width ratio too; the same `seed` gives the
    same routers, draws and noise. Raises UserError for a network that has experts already, a shared expert asked for, or a
    granularity that does not divide its MLPs' width.
    """
    dense, m = weights.config, upcycling.granularity
    if dense.num_experts:
        raise UserError(
            f"dpt.upcycling: the weights ({weights.source}) have {dense.num_experts} experts in each block already; "
            "give dense ones."
        )
    if dense.shared_expert_width:
        raise UserError(
            f"dpt.model.shared_expert_width is {dense.shared_expert_width}; a dense network has no shared expert to start "
            "one from: set it to 0."
        )
    if dense.mlp_width % m:
        raise UserError(f"dpt.upcycling.granularity {m} does not divide the MLPs' width {dense.mlp_width}; choose a divisor.")
    check_state(dense, weights.state, weights.source)
    config = upcycling.apply(dense)
    generator = torch.Generator().manual_seed(seed)
    reinitialised = _Reinitialised(upcycling.reinit_share, config.num_experts, config.mlp_width, seed)
    state = {}
    for name, shape in expected_shapes(config).items():  # a fixed order, so that the seed determines every number
        if match := re.fullmatch(r"(blocks\.\d+)\.moe\.experts\.(fc[12])_(weight|bias)", name):
            mlp = weights.state[f"{match[1]}.mlp.{match[2]}.{match[3]}"]
            experts = _split(mlp, f"{match[2]}.{match[3]}", m).repeat(upcycling.num_experts, *(1 for _ in mlp.shape))
            experts = reinitialised(experts, match[1], f"{match[2]}.{match[3]}")
            state[name] = _add_noise(experts, upcycling.noise_std, generator)
        elif name.endswith(".moe.gate.weight"):
            bound = 1 / math.sqrt(config.hidden_size * config.width_ratio)
            rows = torch.empty(upcycling.num_experts, config.hidden_size).uniform_(-bound, bound, generator=generator)
            state[name] = rows.repeat_interleave(m, dim=0)
        elif name.endswith(".moe.gate.bias_steps"):
            state[name] = torch.zeros(shape, dtype=torch.int64)
        else:
            state[name] = weights.state[name]
    return dataclasses.replace(weights, config=config, state=state)


def _split(tensor: Tensor, kind: str, m: int) -> Tensor:
    """One MLP's tensor as m finer experts [m, ...]; each weighted by 1 / m, they compute the same together."""
    if kind == "fc2.weight":  # [D, F] -> [m, D, F / m]
        return m * torch.stack(tensor.chunk(m, dim=1))
    if kind == "fc2.bias":  # added by each, weighted by 1 / m
        return tensor.expand(m, -1)
    return torch.stack(tensor.chunk(m))


class _Reinitialised:
    """Redraws a share of each expert's hidden units, the same ones in all tensors of a block. Its random numbers are its
    own: they change neither routers nor noise."""

    def __init__(self, share: float, num_experts: int, width: int, seed: int) -> None:
        self._count, self._shape = round(share * width), (num_experts, width)
        self._generator = torch.Generator().manual_seed(_REDRAW_SEED + seed)
        self._chosen: dict[str, Tensor] = {}

    def __call__(self, experts: Tensor, block: str, kind: str) -> Tensor:
        """Redraw units in the experts [E, ...] of one kind of tensor of a block."""
        if not self._count or kind == "fc2.bias":  # belongs to no hidden unit
            return experts
        if block not in self._chosen:
            ranks = torch.rand(self._shape, generator=self._generator).argsort(dim=1).argsort(dim=1)
            self._chosen[block] = ranks < self._count
        drawn = experts.clone()
        for expert, units in zip(drawn, self._chosen[block], strict=True):
            part = expert.mT if kind == "fc2.weight" else expert  # a view, hidden units first
            old = part[units].float()
            fresh = torch.empty(old.shape, dtype=torch.float32).normal_(generator=self._generator)
            part[units] = (old.mean() + old.std(correction=0) * fresh).to(part.dtype)
        return drawn


def _add_noise(experts: Tensor, noise_std: float, generator: torch.Generator) -> Tensor:
    if not noise_std:
        return experts
    noise = torch.empty(experts.shape, dtype=torch.float32).normal_(generator=generator)
    return experts + (noise * (noise_std * experts.float().std())).to(experts.dtype)
