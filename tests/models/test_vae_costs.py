"""MACs and kept activations of VAE decoders against torch's own counts."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from dpt.config.recipe import DptConfig
from dpt.config.sections import DataConfig, DiffusionConfig, ModelConfig, PixelLossConfig
from dpt.embedded import EMBEDDED_VAES
from dpt.models.costs import macs
from dpt.models.recipe_costs import recipe_macs
from dpt.models.vae_costs import STABLE_DIFFUSION, VAESize, decoder_costs, vae_config, vae_size


def kl_shape(*channels: int, layers: int = 1, **more: Any) -> dict[str, Any]:
    """Of an `AutoencoderKL`."""
    levels = len(channels)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return {"block_out_channels": channels, "layers_per_block": layers, "norm_num_groups": 8} | kinds | more


def dc_shape(
    channels: tuple[int, ...], layers: tuple[int, ...], attention: tuple[int, ...] = (), **more: Any
) -> dict[str, Any]:
    """Of an `AutoencoderDC` whose last level has attention over further `attention` scales."""
    kinds = ("ResBlock",) * (len(channels) - 1) + ("EfficientViTBlock" if attention else "ResBlock",)
    scales = ((),) * (len(channels) - 1) + (attention,)
    parts = {"block_types": kinds, "block_out_channels": channels, "layers_per_block": layers, "qkv_multiscales": scales}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in parts.items()}
    return sides | {"attention_head_dim": 8, "latent_channels": 8} | more


EMBEDDED = {key: value for key, value in vae_config("embedded").items() if not key.startswith("_")}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
SHAPES = {
    "embedded": EMBEDDED,
    "two layers, three levels": kl_shape(8, 16, 24, layers=2, mid_block_add_attention=False),
    "attention": kl_shape(8, 16, mid_block_add_attention=True),
    "32 channels": kl_shape(8, 8, 16, 16, 24, layers=2, latent_channels=32, mid_block_add_attention=False, **NO_QUANT),
    "DC, attention": dc_shape((8, 16, 32), (1, 1, 1), (5,)),
    "DC, strides and interpolation": dc_shape(
        (8, 16, 32), (1, 2, 1), upsample_block_type="interpolate", downsample_block_type="Conv"
    ),
    "DC, nothing at full size": dc_shape((8, 16, 32), (0, 2, 1), (3, 5)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_costs_are_what_torch_counts(name: str) -> None:
    shape, dc = SHAPES[name], name.startswith("DC")
    channels = shape["decoder_block_out_channels" if dc else "block_out_channels"]
    vae = (AutoencoderDC if dc else AutoencoderKL)(**shape).requires_grad_(False)
    latents = torch.randn(1, shape.get("latent_channels", 4), 6, 10, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in vae.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other one gets its address

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        vae.decode(latents)
    costs = decoder_costs(shape, 6, 10)
    attends = not dc and shape.get("mid_block_add_attention", True)
    attention = 2 * 60**2 * channels[-1] if attends else 0  # which torch does not count on a CPU
    assert costs.macs == flops.get_total_flops() // 2 + attention
    assert costs.kept == pytest.approx(sum(s.nbytes() // 4 for s in kept.values()), rel=0.1 if dc else 0.02)
    params = sum(p.numel() for p in vae.parameters())
    size = VAESize(params=params, channels=max(channels[:2]), downsampling=2 ** (len(channels) - 1))
    assert vae_size(shape) == size


def test_a_vae_of_unknown_config_counts_as_stable_diffusions() -> None:
    assert vae_config("stabilityai/sd-vae-ft-ema") is STABLE_DIFFUSION
    assert vae_size(STABLE_DIFFUSION) == VAESize(params=83_653_863, channels=256, downsampling=8)


def test_a_pixel_loss_adds_three_decodings_to_training() -> None:
    assert all(vae_config(str(folder)) == vae_config(name) for name, folder in EMBEDDED_VAES.items())
    model = ModelConfig(preset="S/2")
    plain = DptConfig(model=model)
    pixel = DptConfig(
        model=model,
        task="depth",
        data=DataConfig(vae="embedded"),
        diffusion=DiffusionConfig(timesteps="last", prediction_type="sample", vlb_weight=0.0),
        pixel_loss=PixelLossConfig(weight=1.0),
    )
    assert recipe_macs(plain, model, 8, 8) == macs(model, 8, 8)
    decoding = decoder_costs(vae_config("embedded"), 8, 8).macs
    assert recipe_macs(pixel, model, 8, 8).training == macs(model, 8, 8).training + 3 * decoding
    assert recipe_macs(pixel, model, 8, 8).forward == macs(model, 8, 8).forward
