"""MACs and kept activations of VAE decoders against torch's own counts."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from dpt.config.recipe import DptConfig
from dpt.config.sections import DataConfig, DiffusionConfig, ModelConfig, PixelLossConfig
from dpt.data.codec import EMBEDDED_FOLDER
from dpt.models.costs import macs
from dpt.models.decoder_costs import recipe_macs
from dpt.models.vae_costs import STABLE_DIFFUSION, VAESize, decoder_costs, vae_config, vae_size

SHAPES = {
    "embedded": vae_config("embedded"),
    "two layers, three levels": {"block_out_channels": (8, 16, 24), "layers_per_block": 2, "mid_block_add_attention": False},
    "attention": {"block_out_channels": (8, 16), "layers_per_block": 1, "mid_block_add_attention": True},
}


@pytest.mark.parametrize("name", SHAPES)
def test_costs_are_what_torch_counts(name: str) -> None:
    shape: dict[str, Any] = dict(SHAPES[name])
    levels = len(shape["block_out_channels"])
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    known = {key: value for key, value in shape.items() if not key.startswith("_") and key not in kinds}
    vae = AutoencoderKL(**known | {"norm_num_groups": 8}, **kinds).requires_grad_(False)
    latents = torch.randn(1, 4, 6, 10, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in vae.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        vae.decode(latents)
    costs = decoder_costs(shape, 6, 10)
    attention = 2 * 60**2 * shape["block_out_channels"][-1] if shape.get("mid_block_add_attention", True) else 0
    assert costs.macs == flops.get_total_flops() // 2 + attention  # which torch does not count on a CPU
    assert costs.kept == pytest.approx(sum(kept.values()), rel=0.02)


def dc_shape(
    channels: tuple[int, ...], layers: tuple[int, ...], attention: tuple[int, ...] = (), **more: Any
) -> dict[str, Any]:
    """Of an `AutoencoderDC` whose last level has attention over further `attention` scales."""
    kinds = ("ResBlock",) * (len(channels) - 1) + ("EfficientViTBlock" if attention else "ResBlock",)
    scales = ((),) * (len(channels) - 1) + (attention,)
    parts = {"block_types": kinds, "block_out_channels": channels, "layers_per_block": layers, "qkv_multiscales": scales}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in parts.items()}
    return sides | {"attention_head_dim": 8, "latent_channels": 8} | more


DC_SHAPES = {
    "attention": dc_shape((8, 16, 32), (1, 1, 1), (5,)),
    "strides and interpolation": dc_shape(
        (8, 16, 32), (1, 2, 1), upsample_block_type="interpolate", downsample_block_type="Conv"
    ),
    "nothing at full size": dc_shape((8, 16, 32), (0, 2, 1), (3, 5)),
}


@pytest.mark.parametrize("name", DC_SHAPES)
def test_costs_of_deep_compression_are_what_torch_counts(name: str) -> None:
    vae = AutoencoderDC(**DC_SHAPES[name]).requires_grad_(False)
    latents = torch.randn(1, 8, 6, 10, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in vae.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other one gets its address
        return tensor

    with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        vae.decode(latents)
    costs = decoder_costs(DC_SHAPES[name], 6, 10)
    assert costs.macs == flops.get_total_flops() // 2
    assert costs.kept == pytest.approx(sum(t.untyped_storage().nbytes() // 4 for t in kept.values()), rel=0.1)
    size = vae_size(DC_SHAPES[name])
    assert size == VAESize(params=sum(p.numel() for p in vae.parameters()), channels=16, downsampling=4)


def test_sizes_of_vaes_follow_from_their_configs() -> None:
    assert vae_size(STABLE_DIFFUSION) == VAESize(params=83_653_863, channels=256, downsampling=8)
    shape: dict[str, Any] = {"block_out_channels": (8, 8, 16, 16, 24), "latent_channels": 32, "layers_per_block": 2}
    shape |= {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    vae = AutoencoderKL(**shape, **kinds, norm_num_groups=8)
    assert vae_size(shape) == VAESize(params=sum(p.numel() for p in vae.parameters()), channels=8, downsampling=16)


def test_a_pixel_loss_adds_three_decodings_to_training() -> None:
    assert vae_config("embedded")["block_out_channels"] == vae_config(str(EMBEDDED_FOLDER))["block_out_channels"]
    assert vae_config("stabilityai/sd-vae-ft-ema") is STABLE_DIFFUSION
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
