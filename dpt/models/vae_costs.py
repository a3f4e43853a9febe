"""What a VAE costs, from its diffusers config alone: parameters, and decoding with or without gradients. Pure Python."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpt import hub
from dpt.errors import UserError
from dpt.models import dc_costs

STABLE_DIFFUSION: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
"""The VAE of Stable Diffusion 1 and 2, which VAEs whose config is not on this disk count as."""

_EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "vae"


@dataclass(frozen=True, kw_only=True)
class VAESize:
    """How large a VAE is."""

    params: int
    """Of the encoder and the decoder."""
    channels: int
    """Of the decoder's widest layer at the picture's full size."""
    downsampling: int
    """Pixels to one latent, along a side."""


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
    """The config of the VAE called `name` in a recipe: "embedded", a folder's, or of a hub name in the hub's cache; Stable
    Diffusion's if it is on this disk nowhere."""
    path = _config_file(name)
    return STABLE_DIFFUSION if path is None else dict(json.loads(path.read_text(encoding="utf-8")))


def _config_file(name: str) -> Path | None:
    folder = _EMBEDDED if name == "embedded" else Path(name)
    if name and (folder / "config.json").is_file():
        return folder / "config.json"
    from huggingface_hub import try_to_load_from_cache

    try:
        on_hub = hub.parse(hub.with_prefix(name))
    except UserError:
        return None
    file = f"{on_hub.path}/config.json" if on_hub.path else "config.json"
    found = try_to_load_from_cache(on_hub.repo, file, revision=on_hub.revision or None)
    return Path(found) if isinstance(found, str) else None


def is_dc(config: Mapping[str, Any]) -> bool:
    """Whether it is of an `AutoencoderDC`, rather than an `AutoencoderKL`."""
    return config.get("_class_name") == "AutoencoderDC" or "decoder_block_out_channels" in config


def vae_size(config: Mapping[str, Any]) -> VAESize:
    """Of diffusers' `AutoencoderKL(**config)` or `AutoencoderDC(**config)`."""
    if is_dc(config):
        shape = dc_costs.DCShape.of(config)
        return VAESize(params=dc_costs.num_params(shape), channels=max(shape.decoder[:2]), downsampling=shape.downsampling)
    channels, latent = [int(c) for c in config.get("block_out_channels", (64,))], int(config.get("latent_channels", 4))
    layers, top = int(config.get("layers_per_block", 1)), channels[-1]

    def conv(inside: int, outside: int, area: int = 9) -> int:
        return area * inside * outside + outside

    def resnet(inside: int, outside: int) -> int:
        shortcut = conv(inside, outside, 1) if inside != outside else 0
        return 2 * inside + conv(inside, outside) + 2 * outside + conv(outside, outside) + shortcut

    attention = 2 * top + 4 * conv(top, top, 1) if config.get("mid_block_add_attention", True) else 0
    params = 2 * (2 * resnet(top, top) + attention)  # the middle of both
    params += conv(3, channels[0]) + 2 * top + conv(top, 2 * latent)
    params += conv(latent, top) + 2 * channels[0] + conv(channels[0], 3)
    for order, each in ((channels, layers), (channels[::-1], layers + 1)):
        before = order[0]
        for number, channel in enumerate(order):
            params += resnet(before, channel) + (each - 1) * resnet(channel, channel)
            params += conv(channel, channel) if number < len(order) - 1 else 0
            before = channel
    params += conv(2 * latent, 2 * latent, 1) if config.get("use_quant_conv", True) else 0
    params += conv(latent, latent, 1) if config.get("use_post_quant_conv", True) else 0
    return VAESize(params=params, channels=max(channels[:2]), downsampling=2 ** (len(channels) - 1))


def decoder_costs(config: Mapping[str, Any], height: int, width: int) -> DecoderCosts:
    """Costs of the decoder of an `AutoencoderKL(**config)` or `AutoencoderDC(**config)` for latents of height x width."""
    if is_dc(config):
        total, kept, largest = dc_costs.decoding(dc_costs.DCShape.of(config), height, width)
        return DecoderCosts(macs=total, kept=kept, working=3 * largest)
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
