"""Costs of a recipe's optional methods beside the network: pixel losses, bypasses, aligned hidden states, Muon.

From the recipe alone; pure Python, like `dpt.models.costs`.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from dpt.config.checks import trains_with_muon
from dpt.config.recipe import DptConfig, Recipe
from dpt.config.sections import ModelConfig, TrainingConfig
from dpt.models.costs import Macs, hidden_macs, macs, muon_macs, num_params, num_tokens, with_bypass
from dpt.models.vae_costs import decoder_costs, vae_config, vae_size


def recipe_macs(config: DptConfig, model: ModelConfig, height: int = 0, width: int = 0) -> Macs:
    """MACs of one sample of `model` (the architecture trained) under a recipe, for latents of height x width (0: input_size).

    A pixel loss decodes the truth and the prediction, and backpropagates through the decoder; tokens that bypass blocks
    save their MACs; aligned hidden states add projectors and a teacher.
    """
    network = macs(model, height, width)
    if share := config.training.bypass_share:
        network = with_bypass(network, model, share, len(config.training.bypassed(model.depth)), height, width)
    added = alignment_macs(config.training, model, height, width)
    if config.pixel_loss.weight:
        height, width = height or model.input_size, width or model.input_size
        added += 3 * decoder_costs(vae_config(config.data.vae), height, width).macs
    return replace(network, training=network.training + added)


def step_macs(recipe: Recipe, model: ModelConfig, batch: int, height: int = 0, width: int = 0) -> Macs:
    """`recipe_macs` of a sample plus its share of what the optimizer computes in a step of `batch` samples: Muon's products."""
    sample = recipe_macs(recipe.dpt, model, height, width)
    if not trains_with_muon(recipe.deepspeed.get("optimizer", {})):
        return sample
    return replace(sample, training=sample.training + muon_macs(model) // batch)


def decoder_bytes(config: DptConfig, *, micro_batch_size: int, size: int) -> int:
    """Bytes of a pixel loss on a rank, in numbers of `size` bytes: the VAE's weights and the decoder's activations, of
    one image at a time with activation checkpointing."""
    if not config.pixel_loss.weight:
        return 0
    side = config.model.input_size
    vae = vae_config(config.data.vae)
    costs = decoder_costs(vae, side, side)
    images = 1 if config.training.activation_checkpointing else micro_batch_size
    return size * (vae_size(vae).params + images * (costs.kept + costs.working))


def projector_widths(training: TrainingConfig, hidden_size: int) -> dict[str, list[int]]:
    """Inputs, hidden layers and outputs of the projectors that a recipe trains, by name: "self" (SRA's two layers, the hidden
    one twice as wide as the network) and "features" (REPA's three)."""
    d, features = hidden_size, training.feature_alignment
    widths = {}
    if training.self_alignment.weight:
        widths["self"] = [d, 2 * d, d]
    if features.weight:
        widths["features"] = [d, features.projector_width, features.projector_width, features.channels]
    return widths


def teacher_model(training: TrainingConfig, model: ModelConfig) -> ModelConfig:
    """The part of the network kept as the teacher: up to the block it teaches from. It drops no tokens."""
    return replace(model, depth=training.self_alignment.teacher_block, capacity_factor=0.0)


def alignment_params(training: TrainingConfig, model: ModelConfig) -> int:
    """Parameters of the projectors."""
    return sum(inputs * outputs + outputs for inputs, outputs in _layers(training, model))


def _layers(training: TrainingConfig, model: ModelConfig) -> Iterator[tuple[int, int]]:
    for widths in projector_widths(training, model.hidden_size).values():
        yield from pairwise(widths)


def alignment_macs(training: TrainingConfig, model: ModelConfig, height: int = 0, width: int = 0) -> int:
    """MACs that a sample of height x width latents (0: input_size) takes beyond the network's own: the projectors forward and
    backward, and the teacher's forward pass."""
    tokens = num_tokens(model, height, width)
    total = 3 * tokens * sum(inputs * outputs for inputs, outputs in _layers(training, model))
    if training.self_alignment.weight:
        total += hidden_macs(teacher_model(training, model), height, width)
    return total


def alignment_bytes(training: TrainingConfig, model: ModelConfig, *, micro_batch_size: int, size: int) -> int:
    """Bytes on a rank, in numbers of `size` bytes: the teacher (whole on each rank, all experts too), the hidden states that
    it returned, and what the projectors and the losses keep for the backward pass."""
    tokens, total = micro_batch_size * num_tokens(model), 0
    for widths in projector_widths(training, model.hidden_size).values():
        total += tokens * (2 * size * sum(widths[1:-1]) + (size + 8) * widths[-1])  # SiLU's input and output; float32 copies
    if training.self_alignment.weight:
        total += size * (num_params(teacher_model(training, model)).total + tokens * model.hidden_size)
    return total
