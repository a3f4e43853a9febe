"""MACs and kept activations of VAE decoders against torch's own counts."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from dpt.config.recipe import DptConfig
from dpt.config.sections import DataConfig, DiffusionConfig, ModelConfig, PixelLossConfig
from dpt.data.codec import EMBEDDED_FOLDER
from dpt.models.costs import macs
from dpt.models.decoder_costs import STABLE_DIFFUSION, decoder_costs, recipe_macs, vae_config

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
