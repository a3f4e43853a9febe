"""What a sample costs under a recipe: the network, and what its optional methods add. Pure Python, as `dpt.models.costs`."""

from dataclasses import replace

from dpt.config.checks import trains_with_muon
from dpt.config.recipe import DptConfig, Recipe
from dpt.config.sections import ModelConfig
from dpt.models.alignment_costs import alignment_macs
from dpt.models.costs import Macs, macs, muon_macs, with_bypass
from dpt.models.vae_costs import decoder_costs, vae_config, vae_size


def recipe_macs(config: DptConfig, model: ModelConfig, height: int = 0, width: int = 0) -> Macs:
    """MACs of one sample of `model` (the architecture trained) under a recipe, for latents of height x width (0: input_size).

    A pixel loss decodes the truth and the prediction, and leads gradients back through the decoder; tokens that bypass blocks
    save those; aligned hidden states take projectors and a teacher.
    """
    network = macs(model, height, width)
    if share := config.training.bypass_share:
        network = with_bypass(network, model, share, len(config.training.bypassed(model.depth)), height, width)
    network = replace(network, training=network.training + alignment_macs(config.training, model, height, width))
    if not config.pixel_loss.weight:
        return network
    decoder = decoder_costs(vae_config(config.data.vae), height or model.input_size, width or model.input_size)
    return replace(network, training=network.training + 3 * decoder.macs)


def step_macs(recipe: Recipe, model: ModelConfig, batch: int, height: int = 0, width: int = 0) -> Macs:
    """`recipe_macs` of a sample with its share of what the optimizer computes in a step of `batch` samples: Muon's products."""
    sample = recipe_macs(recipe.dpt, model, height, width)
    if not trains_with_muon(recipe.deepspeed.get("optimizer", {})):
        return sample
    return replace(sample, training=sample.training + muon_macs(model) // batch)


def decoder_bytes(config: DptConfig, *, micro_batch_size: int, size: int) -> int:
    """Bytes of a pixel loss on a rank, in numbers of `size` bytes: the VAE's weights, and decoded predictions' activations, of
    one image at a time with activation checkpointing."""
    if not config.pixel_loss.weight:
        return 0
    side = config.model.input_size
    vae = vae_config(config.data.vae)
    costs = decoder_costs(vae, side, side)
    images = 1 if config.training.activation_checkpointing else micro_batch_size
    return size * (vae_size(vae).params + images * (costs.kept + costs.working))
