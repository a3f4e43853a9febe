"""What aligning hidden states costs, from the recipe alone. Pure Python, as `dpt.models.costs`."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from dpt.config.sections import ModelConfig, TrainingConfig
from dpt.models.costs import hidden_macs, num_params, num_tokens


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
    """The part of the network that is held as the teacher: up to its block. It drops no tokens."""
    return replace(model, depth=training.self_alignment.teacher_block, capacity_factor=0.0)


def alignment_params(training: TrainingConfig, model: ModelConfig) -> int:
    """Parameters of the projectors."""
    return sum(inputs * outputs + outputs for inputs, outputs in _layers(training, model))


def alignment_macs(training: TrainingConfig, model: ModelConfig, height: int = 0, width: int = 0) -> int:
    """MACs that a sample of height x width latents (0: input_size) takes beside the network's own: the projectors forward and
    backward, and the teacher's forward pass."""
    tokens = num_tokens(model, height, width)
    macs = 3 * tokens * sum(inputs * outputs for inputs, outputs in _layers(training, model))
    if training.self_alignment.weight:
        macs += hidden_macs(teacher_model(training, model), height, width)
    return macs


def alignment_bytes(training: TrainingConfig, model: ModelConfig, *, micro_batch_size: int, size: int) -> int:
    """Bytes on a rank, in numbers of `size` bytes: the teacher (whole on each rank, all experts too), the hidden states that
    it gave, and what the projectors and the losses keep for the backward pass."""
    tokens, total = micro_batch_size * num_tokens(model), 0
    for widths in projector_widths(training, model.hidden_size).values():
        total += tokens * (2 * size * sum(widths[1:-1]) + (size + 8) * widths[-1])  # SiLU's input and output; float32 copies
    if training.self_alignment.weight:
        total += size * (num_params(teacher_model(training, model)).total + tokens * model.hidden_size)
    return total


def _layers(training: TrainingConfig, model: ModelConfig) -> Iterator[tuple[int, int]]:
    for widths in projector_widths(training, model.hidden_size).values():
        yield from pairwise(widths)
