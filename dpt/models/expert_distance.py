"""How different a layer's experts are: 0 for upcycled copies, until training or reinitialised units set them apart."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpt.models.dit import DiT
from dpt.models.moe import MoE

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]


@torch.no_grad()
def expert_distances(model: DiT, gather: Gather = lambda _: nullcontext()) -> Tensor:
    """Each layer's experts' root-mean-square distance over pairs, in units of their root-mean-square norm: float64 [L], CPU.

    All weights of an expert are one vector w. The distance is 0 for copies, and about sqrt(2) for independent ones. With m
    the mean of the E experts, the sum over pairs of |w_i - w_j|^2 is E sum |w_i - m|^2, so no pair is formed, and
    ranks sharing the experts exchange one expert's sums and two numbers per layer. Collective among them. `gather`: a context
    in which parameters are whole (ZeRO 3). Dense models: an empty tensor.
    """
    layers = [block.moe for block in model.blocks if block.moe is not None]
    if not layers:
        return torch.empty(0, dtype=torch.float64)
    return torch.stack([_distance(layer, gather) for layer in layers]).cpu()


def _distance(layer: MoE, gather: Gather) -> Tensor:
    """The expert distance of one layer, float64 []."""
    group = getattr(layer, "ep_group", None)
    parameters, count = list(layer.experts.parameters()), layer.num_experts
    sums = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)
    with gather(parameters):
        for stacked in parameters:
            mean = stacked.sum(dim=0, dtype=torch.float32)
            if group is not None:
                dist.all_reduce(mean, group=group)
            mean /= count
            for expert in stacked:
                expert = expert.float()
                sums += torch.stack([(expert - mean).square().sum(), expert.square().sum()]).double()
    if group is not None:
        dist.all_reduce(sums, group=group)
    return (2 * count / (count - 1) * sums[0] / sums[1]).sqrt()
