"""A VAE's costs, from its diffusers config alone: parameters, and decoding with or without gradients. Pure Python."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpt import hub
from dpt.embedded import EMBEDDED_VAES
from dpt.errors import UserError
from dpt.models import dc_costs, kl_costs

STABLE_DIFFUSION: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
"""The VAE of Stable Diffusion 1 and 2, assumed for VAEs whose config is not on this disk."""


@dataclass(frozen=True, kw_only=True)
class VAESize:
    """How large a VAE is."""

    params: int
    """Parameters of the encoder and the decoder."""
    channels: int
    """Channels of the decoder's widest layer at the picture's full size."""
    downsampling: int
    """Pixels per latent along a side."""


@dataclass(frozen=True, kw_only=True)
class DecoderCosts:
    """Costs of decoding one image."""

    macs: int
    """MACs of a forward pass; the backward pass to the latents takes as many, as the weights are frozen."""
    kept: int
    """Numbers that autograd keeps for the backward pass."""
    working: int
    """Numbers that the backward pass works in: three of the largest array."""


def vae_config(name: str) -> Mapping[str, Any]:
    """The config of the VAE called `name` in a recipe: an embedded one, a folder's, or of a hub name in the hub's cache; Stable
    Diffusion's if it is nowhere on this disk."""
    path = _config_file(name)
    return STABLE_DIFFUSION if path is None else dict(json.loads(path.read_text(encoding="utf-8")))


def _config_file(name: str) -> Path | None:
    folder = EMBEDDED_VAES.get(name, Path(name))
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


def vae_size(config: Mapping[str, Any]) -> VAESize:
    """The size of diffusers' `AutoencoderKL(**config)` or `AutoencoderDC(**config)`."""
    kind = dc_costs if _is_dc(config) else kl_costs
    layers = [*kind.encoder(config), *(layer for _, layer in kind.decoder(config))]
    channels = kind.channels(config)
    params = sum(layer.params for layer in layers)
    return VAESize(params=params, channels=max(channels[:2]), downsampling=2 ** (len(channels) - 1))


def decoder_costs(config: Mapping[str, Any], height: int, width: int) -> DecoderCosts:
    """Costs of the decoder of an `AutoencoderKL(**config)` or `AutoencoderDC(**config)` for latents of height x width."""
    macs = kept = largest = 0
    for doublings, layer in (dc_costs if _is_dc(config) else kl_costs).decoder(config):
        pixels = height * width * 4**doublings
        macs += layer.macs * pixels + layer.scores(pixels)
        kept += layer.kept * pixels
        largest = max(largest, layer.width * pixels)
    return DecoderCosts(macs=macs, kept=kept, working=3 * largest)


def _is_dc(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") == "AutoencoderDC" or "decoder_block_out_channels" in config
