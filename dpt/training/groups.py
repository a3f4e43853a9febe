"""Group parameters by learning rate: the optimizer's groups, as DeepSpeed partitions them."""

from collections import defaultdict
from typing import Any

from torch import nn

from dpt.config.sections import ModelConfig
from dpt.models.mup import rate_divisor
from dpt.training.fragments import PREFIX
from dpt.training.muon import matrices


def parameter_groups(
    module: nn.Module, config: ModelConfig, weight_decay: float, *, with_muon: bool = False
) -> list[dict[str, Any]]:
    """Group the trained parameters by the divisor of their learning rate ("rate_divisor", muP) and whether Muon trains them
    ("muon"); experts spread over ranks are separate from the rest, as DeepSpeed requires."""
    parts: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix(PREFIX)
        divisor, muon = rate_divisor(name, config), with_muon and matrices(name, parameter.shape) is not None
        parts[divisor**0.5 if muon else divisor, muon].append(parameter)  # Muon's updates grow with the root of the width
    groups: list[dict[str, Any]] = [
        {
            "params": params,
            "name": f"divided by {divisor:g}{', Muon' if muon else ''}",
            "rate_divisor": divisor,
            "weight_decay": weight_decay * divisor,
            "muon": muon,
        }
        for (divisor, muon), params in parts.items()
    ]
    if all(getattr(p, "allreduce", True) for p in module.parameters()):
        return groups
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    return [group for group in split_params_into_different_moe_groups_for_optimizer(groups) if group["params"]]
