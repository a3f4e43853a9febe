"""What training through a VAE's decoder costs, from its config alone. Pure Python, as `dpt.models.costs`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpt.config.recipe import DptConfig
from dpt.config.sections import ModelConfig
from dpt.models.alignment_costs import alignment_macs
from dpt.models.costs import Macs, macs, with_bypass

STABLE_DIFFUSION: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
"""The decoder of Stable Diffusion 1 and 2, which VAEs whose config is not on this disk count as."""

_EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "vae"


@dataclass(frozen=True, kw_only=True)
class DecoderCosts:
    """Of decoding one image."""

    macs: int
    """Of a forward pass; the backward pass to the latents is as many, for the weights are frozen."""
    kept: int
    """Numbers that autograd keeps for the backward pass."""
    working: int
    """Numbers that the backward pass works in: three of the largest array."""


def vae_config(name: str) -> Mapping[str, Any]:
    """The config of the VAE called `name` in a recipe: "embedded", or a folder's; Stable Diffusion's if it is neither."""
    path = (_EMBEDDED if name == "embedded" else Path(name)) / "config.json"
    if not name or not path.is_file():
        return STABLE_DIFFUSION
    return dict(json.loads(path.read_text(encoding="utf-8")))


def decoder_costs(config: Mapping[str, Any], height: int, width: int) -> DecoderCosts:
    """Costs of the decoder of diffusers' `AutoencoderKL(**config)` for latents of height x width."""
    channels = [int(c) for c in reversed(config["block_out_channels"])]
    layers = int(config.get("layers_per_block", 1)) + 1
    latent, top, pixels = int(config.get("latent_channels", 4)), channels[0], height * width
    total = pixels * (latent * latent * bool(config.get("use_post_quant_conv", True)) + 9 * latent * top)
    kept = largest = 2 * pixels * latent

    def resnet(inside: int, outside: int) -> None:
        nonlocal total, kept, largest
        total += pixels * (9 * (inside + outside) * outside + inside * outside * (inside != outside))
        kept += 3 * pixels * (inside + outside)  # inputs of norm, activation and convolution, twice
        largest = max(largest, pixels * max(inside, outside))

    for _ in range(2):
        resnet(top, top)
    if config.get("mid_block_add_attention", True):
        total += 4 * pixels * top * top + 2 * pixels * pixels * top
        kept += 5 * pixels * top
    before = top
    for number, channel in enumerate(channels):
        for layer in range(layers):
            resnet(before if layer == 0 else channel, channel)
        before = channel
        if number < len(channels) - 1:
            pixels *= 4
            total += pixels * 9 * channel * channel
            kept += pixels * channel
            largest = max(largest, pixels * channel)
    total += pixels * 9 * channels[-1] * 3
    kept += 3 * pixels * channels[-1]
    return DecoderCosts(macs=total, kept=kept, working=3 * largest)


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


def decoder_bytes(config: DptConfig, *, micro_batch_size: int, size: int, vae_params: int) -> int:
    """Bytes of a pixel loss on a rank, in numbers of `size` bytes: the VAE's weights, and decoded predictions' activations, of
    one image at a time with activation checkpointing."""
    if not config.pixel_loss.weight:
        return 0
    side = config.model.input_size
    costs = decoder_costs(vae_config(config.data.vae), side, side)
    images = 1 if config.training.activation_checkpointing else micro_batch_size
    return size * (vae_params + images * (costs.kept + costs.working))
