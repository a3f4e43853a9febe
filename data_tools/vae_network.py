"""The network of the embedded VAEs, and how it is given more latent channels."""

from typing import Any

import torch
from torch import Tensor

from data_tools.vae_images import RESOLUTION

BLOCK_OUT_CHANNELS = (16, 32, 64, 112)
"""Few channels at full resolution, where a CPU spends its time, many at the resolution of the latents."""


def build_vae(seed: int, latent_channels: int = 4) -> Any:
    """An untrained `AutoencoderKL` of the embedded VAEs' shape: 2.1 million parameters, 4.2 MB in fp16."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    levels = len(BLOCK_OUT_CHANNELS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=BLOCK_OUT_CHANNELS,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=RESOLUTION,
        force_upcast=False,
    ).to(memory_format=torch.channels_last)


def widened(state: dict[str, Tensor], vae: Any) -> dict[str, Tensor]:
    """The weights of a VAE with fewer latent channels, for `vae`, which uses them as before in its first channels.

    The further channels start from `vae`'s own weights, but the 1x1 convolutions beside the latents pass them on unchanged.
    """
    few, many = state["post_quant_conv.bias"].numel(), vae.config.latent_channels
    old = torch.arange(few)
    moments = torch.cat([old, many + old])  # means and log-variances
    wide = {name: weight.clone() for name, weight in vae.state_dict().items()}
    for conv, kept in (("quant_conv", moments), ("post_quant_conv", old)):
        wide[f"{conv}.weight"] = torch.eye(len(wide[f"{conv}.bias"]))[:, :, None, None]
        wide[f"{conv}.weight"][kept[:, None], kept] = state[f"{conv}.weight"]
        wide[f"{conv}.bias"].zero_()[kept] = state[f"{conv}.bias"]
    wide["encoder.conv_out.weight"][moments] = state["encoder.conv_out.weight"]
    wide["encoder.conv_out.bias"][moments] = state["encoder.conv_out.bias"]
    wide["decoder.conv_in.weight"][:, old] = state["decoder.conv_in.weight"]
    beside = ("quant_conv.", "post_quant_conv.", "encoder.conv_out.", "decoder.conv_in.weight")
    return wide | {name: weight for name, weight in state.items() if not name.startswith(beside)}
