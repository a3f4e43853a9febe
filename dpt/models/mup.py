"""The maximal update parametrisation (muP) of a Diffusion Transformer: initial weights and learning rates at a width.

Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer", 2022, for Adam; for
Diffusion Transformers Zheng et al., "Scaling Diffusion Transformers Efficiently via muP", 2025. With m = hidden_size /
base_width, relative to the standard parametrisation at base_width:

| weights | initial deviation | learning rate |
|---|---|---|
| from a fixed number of inputs (patches, labels, sines of time, CLIP) and vectors | as there | as there |
| from width to width (attention, MLPs, experts, adaLN, the timestep MLP's second layer) | / sqrt(m) | / m |
| routers: from width to the experts | / m | / m |
| the final layer, whose products are divided by m | as there (zero) | as there |

Attention scores are divided by the head size instead of its root. At base_width, with heads of base_head_size, nothing differs.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from dpt.config.sections import ModelConfig

_ROUTER = re.compile(r"blocks\.\d+\.moe\.gate\.weight")
_FROM_WIDTH = re.compile(
    r"(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]|moe\.gate|moe\.shared\.(gate_up|down)|adaLN_modulation\.1)"
    r"|t_embedder\.mlp\.2|final_layer\.adaLN_modulation\.1)\.weight"
    r"|blocks\.\d+\.moe\.experts\.\w+_weight"
    r"|alignment\.(self\.\d|features\.0)\.weight"
)
"""Matrices whose input is the width, except the final layer's; including those of training's projectors."""
_PATCHES = re.compile(r"x_embedder\.(proj\.)?weight")


def rate_divisor(name: str, config: ModelConfig) -> float:
    """Divisor of a parameter's learning rate; its weight decay is multiplied by it, so that their product stays."""
    return config.width_ratio if _FROM_WIDTH.fullmatch(name) else 1.0


@torch.no_grad()
def scale_initial_weights(parameters: Iterable[tuple[str, nn.Parameter]], config: ModelConfig) -> None:
    """Scale DiT's initial weights to muP's, in place. Xavier's deviations of hidden matrices already fall with the width;
    those of the patch embedding must not, and normal ones of a fixed deviation must."""
    for name, parameter in parameters:
        if _PATCHES.fullmatch(name):
            inputs = parameter[0].numel() if parameter.dim() == 4 else parameter[0, 0].numel()  # single task, several tasks
            parameter.mul_(((inputs + config.hidden_size) / (inputs + config.base_width)) ** 0.5)
        elif name == "t_embedder.mlp.2.weight" or _ROUTER.fullmatch(name):
            parameter.div_(config.width_ratio**0.5)


def standard(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The equivalent network in the standard parametrisation: its config, and its tensors (dtypes kept).

    The final layer's divisor is folded into its weights, the scale of attention scores into the queries (or their norm).
    """
    if not config.base_width:
        return config, dict(state)
    plain = replace(config, base_width=0)
    factor = config.attention_scale / plain.attention_scale
    folded = dict(state)
    folded["final_layer.linear.weight"] = state["final_layer.linear.weight"] / config.width_ratio
    for block in range(config.depth):
        for kind in ("weight", "bias"):
            if config.qk_norm:
                name = f"blocks.{block}.attn.q_norm.{kind}"
                folded[name] = state[name] * factor
            else:
                name = f"blocks.{block}.attn.qkv.{kind}"
                queries, others = state[name].tensor_split([config.hidden_size])
                folded[name] = torch.cat([queries * factor, others])
    return plain, folded
