"""Adapt weights to another input or other labels: more conditions, task labels, one convolution per task, a CLIP projection."""

import dataclasses

import torch
from torch import Tensor

from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models.weights import Weights, check_state

_ADAPTED = {"num_conditions", "num_classes", "patch_embed_tasks", "clip_embedding_size", "router_bias_balancing"}
_FREE = {"preset", "input_size", "class_dropout_prob", "capacity_factor"}
"""Fields that no tensor depends on; positions are computed for any size."""
_OF_EXPERTS = {"top_k", "expert_activation", "shared_expert_width", "normalize_top_k", "router_gate"}
"""Fields that have no meaning without experts."""


def adapt(weights: Weights, target: ModelConfig) -> Weights:
    """Convert `weights` to those of `DiT(target)`, for fine-tuning.

    Conditions: the patch embedding is repeated for each image and divided by their number. Labels: each new one starts as the
    mean of its share of the old class rows (4 new ones on 1000 classes: rows 0-249, 250-499, 500-749, 750-999), the null
    label's row stays last. One convolution per task: each starts as a copy of the original. CLIP projection: zero. Convolutions
    in the MLPs: the identity. UserError if another field differs.
    """
    source = weights.config
    may_differ = _ADAPTED | _FREE | (set() if source.num_experts or target.num_experts else _OF_EXPERTS)
    if source.patch_embed_tasks:
        may_differ.discard("patch_embed_tasks")
    if not source.mlp_kernel_size:
        may_differ.add("mlp_kernel_size")
    if not source.base_width and not target.base_width:  # meaningless without muP
        may_differ.add("base_head_size")
    for name in [f.name for f in dataclasses.fields(ModelConfig) if f.name not in may_differ]:
        old, new = getattr(source, name), getattr(target, name)
        if old != new:
            raise UserError(f"dpt.model.{name} is {new}, but the weights ({weights.source}) have {old}; set it to {old}.")
    state = dict(weights.state)
    _widen(state, source, target, weights.source)
    if target.patch_embed_tasks and not source.patch_embed_tasks:  # one convolution per task, all equal
        for kind in ("weight", "bias"):
            state[f"x_embedder.{kind}"] = torch.stack([state.pop(f"x_embedder.proj.{kind}")] * target.patch_embed_tasks)
    _add_labels(state, source, target, weights.source)
    if target.clip_embedding_size and not source.clip_embedding_size:
        table = state["y_embedder.embedding_table.weight"]
        state["clip_embedder.weight"] = table.new_zeros(target.hidden_size, target.clip_embedding_size)
    for block in range(target.depth):
        if target.mlp_kernel_size and not source.mlp_kernel_size:
            kernels = state[f"blocks.{block}.mlp.fc1.weight"].new_empty(target.mlp_width, 1, *(target.mlp_kernel_size,) * 2)
            state[f"blocks.{block}.mlp.conv.weight"] = torch.nn.init.dirac_(kernels, groups=target.mlp_width)
        name = f"blocks.{block}.moe.gate.bias_steps"
        if target.num_experts and target.router_bias_balancing and name not in state:
            state[name] = torch.zeros(target.num_experts, dtype=torch.int64)
        elif not target.router_bias_balancing:
            state.pop(name, None)
    check_state(target, state, weights.source)
    return dataclasses.replace(weights, config=target, state=state)


def _widen(state: dict[str, Tensor], source: ModelConfig, target: ModelConfig, weights: str) -> None:
    """Repeat the patch embedding's weights for 1 + num_conditions images and divide by their number (Ke et al., "Repurposing
    Diffusion-Based Image Generators for Monocular Depth Estimation", 2024, section 3.2)."""
    if source.num_conditions == target.num_conditions:
        return
    if source.num_conditions:
        raise UserError(
            f"dpt.model.num_conditions is {target.num_conditions}, but the weights ({weights}) have "
            f"{source.num_conditions} already; set it to {source.num_conditions}, or start from weights without conditions."
        )
    images = 1 + target.num_conditions
    name = "x_embedder.weight" if source.patch_embed_tasks else "x_embedder.proj.weight"
    state[name] = torch.cat([state[name] / images] * images, dim=-3)  # [..., D, C, p, p]


def _add_labels(state: dict[str, Tensor], source: ModelConfig, target: ModelConfig, weights: str) -> None:
    """Insert the new label rows before the null label's row."""
    new = target.num_classes - source.num_classes
    if new == 0:
        return
    if new < 0 or new > source.num_classes:
        raise UserError(
            f"dpt.model.num_classes is {target.num_classes}, but the weights ({weights}) have {source.num_classes} labels; "
            f"set it to {source.num_classes} plus the number of new task labels."
        )
    name = "y_embedder.embedding_table.weight"
    classes, null = state[name][:-1], state[name][-1:]
    means = torch.stack([rows.mean(dim=0) for rows in classes.tensor_split(new)])
    state[name] = torch.cat([classes, means, null])
