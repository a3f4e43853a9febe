"""Maps from our tensors to those in public weights: names, the order of parts, and the architecture inferred from shapes.

Sources: the released models' key lists of facebookresearch/DiT, feizc/DiT-MoE (plain and flash-attention), and the generalist
of "Scaling Properties of Diffusion Models for Perceptual Tasks".
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpt.config.presets import PRESETS
from dpt.config.sections import ModelConfig
from dpt.errors import UserError


@dataclass(frozen=True)
class Source:
    """The tensors that one of ours is made of: each group of names is concatenated, the groups are stacked if `stacked`."""

    groups: list[list[str]]
    stacked: bool = False

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group]

    def join(self, state: Mapping[str, Tensor]) -> Tensor:
        parts = [torch.cat([state[n] for n in group]) if len(group) > 1 else state[group[0]] for group in self.groups]
        return torch.stack(parts) if self.stacked else parts[0]

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Split one of our tensors into the named parts, of equal size: the inverse of `join` where nothing is stacked."""
        (names,) = self.groups
        if len(names) == 1:
            return {names[0]: tensor}
        return {name: chunk.clone() for name, chunk in zip(names, tensor.chunk(len(names)), strict=True)}


Map = Callable[[str, ModelConfig], Source]
"""Maps the name of one of our tensors to its source in theirs."""


def public_map(flash: bool) -> Map:
    """The map to DiT's names; `flash`: DiT-MoE's flash-attention variant's names for the attention."""

    def source(name: str, config: ModelConfig) -> Source:
        if match := re.fullmatch(r"(blocks\.\d+\.moe\.experts)\.(.+)_(weight|bias)", name):
            prefix, layer, kind = match.groups()
            layers = {"gate_up": ["gate_proj", "up_proj"], "down": ["down_proj"]}.get(layer, [layer])
            return Source([[f"{prefix}.{e}.{n}.{kind}" for n in layers] for e in range(config.num_experts)], stacked=True)
        if match := re.fullmatch(r"(blocks\.\d+\.moe)\.shared\.(gate_up|down)\.weight", name):
            layers = ["gate_proj", "up_proj"] if match[2] == "gate_up" else ["down_proj"]
            return Source([[f"{match[1]}.shared_experts.{n}.weight" for n in layers]])
        if config.patch_embed_tasks and (match := re.fullmatch(r"x_embedder\.(weight|bias)", name)):
            tasks = range(1, config.patch_embed_tasks + 1)
            return Source([[f"x_embedder.proj.conv_in_{t}.{match[1]}"] for t in tasks], stacked=True)
        if flash:
            name = name.replace(".attn.qkv.", ".attn.Wqkv.").replace(".attn.proj.", ".attn.out_proj.")
        return Source([[name]])

    return source


def infer_public_config(state: Mapping[str, Tensor], **known: Any) -> ModelConfig:
    """Infer the architecture of weights under DiT's names from keys and shapes; `known` fields win.

    Shapes show neither top_k (2 in all released models) nor the heads, which are those of the preset of the same width and
    depth, or follow from a query norm; UserError if neither determines them.
    """
    convolutions = [state[key] for key in state if re.fullmatch(r"x_embedder\.proj\.(conv_in_\d+\.)?weight", key)]
    if not convolutions:
        raise UserError("the weights resemble a DiT's, but have no patch embedding x_embedder.proj.")
    for tensor in convolutions:
        _check_rank("x_embedder.proj", tensor, 4)
    hidden_size, total_in, patch_size, _ = convolutions[0].shape
    depth = _count(state, r"blocks\.(\d+)\.")
    fields: dict[str, Any] = {
        "input_size": math.isqrt(_shape(state, "pos_embed", 3)[1]) * patch_size,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_classes": _shape(state, "y_embedder.embedding_table.weight")[0] - 1,
        "patch_embed_tasks": len(convolutions) if "x_embedder.proj.weight" not in state else 0,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        **infer_channels(total_in, _shape(state, "final_layer.linear.weight")[0] // patch_size**2),
    }
    if "blocks.0.moe.gate.weight" in state:
        fields |= _expert_fields(state, hidden_size)
    else:
        fields["mlp_ratio"] = _shape(state, "blocks.0.mlp.fc1.weight")[0] / hidden_size
    if "num_heads" not in known:
        if fields["qk_norm"]:
            fields["num_heads"] = hidden_size // _shape(state, "blocks.0.attn.q_norm.weight", 1)[0]
        else:
            fields["num_heads"] = _heads(hidden_size, depth)
    return named(ModelConfig(**fields | known))


def named(config: ModelConfig) -> ModelConfig:
    """The config under the name of its preset, or of the dense one it was upcycled from; else "custom"."""
    sizes = {size: getattr(config, size) for size in ("hidden_size", "depth", "num_heads", "patch_size")}
    num_experts = config.num_experts if config.shared_expert_width else 0
    for name, preset in PRESETS.items():
        if preset.get("num_experts", 0) == num_experts and sizes.items() <= preset.items():
            return replace(config, preset=name)
    return replace(config, preset="custom")


def _expert_fields(state: Mapping[str, Tensor], hidden_size: int) -> dict[str, Any]:
    swiglu = "blocks.0.moe.experts.0.gate_proj.weight" in state
    first = "blocks.0.moe.experts.0.gate_proj.weight" if swiglu else "blocks.0.moe.experts.0.fc1.weight"
    shared = "blocks.0.moe.shared_experts.gate_proj.weight"
    return {
        "num_experts": _shape(state, "blocks.0.moe.gate.weight")[0],
        "top_k": 2,
        "normalize_top_k": False,
        "expert_activation": "swiglu" if swiglu else "gelu",
        "mlp_ratio": _shape(state, first)[0] / hidden_size,
        "shared_expert_width": _shape(state, shared)[0] if shared in state else 0,
    }


def infer_channels(total_in: int, out: int) -> dict[str, Any]:
    """Infer in_channels, num_conditions and learn_sigma from the channels in and out; latents of 4 channels if that fits."""
    for channels in (4, total_in):
        if total_in % channels == 0 and out in (channels, 2 * channels):
            return {"in_channels": channels, "num_conditions": total_in // channels - 1, "learn_sigma": out == 2 * channels}
    raise UserError(f"weights for {total_in} channels in and {out} out: neither 4-channel latents nor an unconditional model.")


def _heads(hidden_size: int, depth: int) -> int:
    heads = {p["num_heads"] for p in PRESETS.values() if (p["hidden_size"], p["depth"]) == (hidden_size, depth)}
    if len(heads) != 1:
        raise UserError(
            f"the weights do not tell the number of attention heads of a network of width {hidden_size} and depth {depth}; "
            "give num_heads (dpt import: --heads)."
        )
    return heads.pop()


def _shape(state: Mapping[str, Tensor], name: str, rank: int = 2) -> torch.Size:
    if name not in state:
        raise UserError(f"the weights resemble a DiT's, but {name} is missing.")
    _check_rank(name, state[name], rank)
    return state[name].shape


def _check_rank(name: str, tensor: Tensor, rank: int) -> None:
    if tensor.dim() != rank or 0 in tensor.shape:
        raise UserError(f"{name} is of shape {list(tensor.shape)}; in a DiT it has {rank} dimensions, none of them 0.")


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """The largest number that `pattern` finds at the start of a name, plus one."""
    numbers = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    if not numbers:
        raise UserError("the weights resemble a DiT's, but have no blocks.")
    return max(numbers) + 1
