"""The VAE codec: the embedded VAE, full-size ones in the published layout, and what is refused."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data_tools.synthesis import make_scene, render
from dpt.data.codec import LatentScaling, VAECodec, load_vae, mean_latents, sample_latents
from dpt.embedded import EMBEDDED_VAES
from dpt.errors import UserError
from dpt.tasks import image_to_float

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def codec():
    return load_vae("embedded")


@pytest.fixture(scope="module")
def images():
    """Four unseen synthetic images, float32 [4, 3, 128, 128]."""
    return torch.from_numpy(np.stack([image_to_float(render(make_scene(7, "test", i), 128).image) for i in range(4)]))


def small_vae(**changes):
    """A random AutoencoderKL of few parameters."""
    shape = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 8, "latent_channels": 4} | changes
    levels = len(shape["block_out_channels"])
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **shape
    )


# --- what a codec gives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels"), [("embedded", 4), ("embedded16", 16)])
def test_embedded_vaes_fit_the_package(name, channels):
    codec, folder = load_vae(name), EMBEDDED_VAES[name]
    assert (folder / WEIGHTS).stat().st_size <= 5_000_000
    assert (folder / "README.md").is_file()
    assert (codec.name, codec.latent_channels, codec.downsampling) == (name, channels, 8)
    assert codec.scaling_factor == json.loads((folder / "config.json").read_text())["scaling_factor"]


def test_codec_does_what_diffusers_does(codec, images):
    """Within [-1, 1], which latents of three times the size leave."""
    posterior = codec.vae.encode(images).latent_dist
    moments = codec.encode(images)
    torch.testing.assert_close(moments, torch.stack([posterior.mean, posterior.logvar], 1))
    expected = codec.vae.decode(3 * posterior.mean).sample
    assert expected.abs().max() > 1
    decoded = codec.decode(3 * mean_latents(moments, codec.scaling))
    torch.testing.assert_close(decoded, expected.clamp(-1, 1), atol=1e-4, rtol=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), scaling_factor=st.floats(0.1, 10))
def test_samples_equal_diffusers_posterior(seed, scaling_factor):
    moments = torch.randn(2, 2, 4, 3, 5, generator=torch.Generator().manual_seed(seed))
    posterior = DiagonalGaussianDistribution(torch.cat([moments[:, 0], moments[:, 1]], dim=1))
    noise = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(seed + 1))
    expected = posterior.sample(generator=torch.Generator().manual_seed(seed + 1)) * scaling_factor
    scaling = LatentScaling(scale=scaling_factor)
    torch.testing.assert_close(sample_latents(moments, scaling, noise), expected)
    torch.testing.assert_close(mean_latents(moments, scaling), posterior.mode() * scaling_factor)


@pytest.mark.parametrize("given", ["shift_factor", "statistics", "both"])
def test_other_scalings_are_diffusers_ones(given):
    """Shift as in diffusers' SD3 pipelines, statistics by channel as in those of SDXL."""
    statistics = {"latents_mean": (0.5, -1.0, 0.0, 2.0), "latents_std": (1.5, 2.0, 3.0, 4.0)}
    config = {"scaling_factor": 0.5, **({} if given == "shift_factor" else statistics)}
    config |= {} if given == "statistics" else {"shift_factor": 0.25}
    codec = VAECodec(small_vae(**config), "toy")
    moments = torch.randn(2, 2, 4, 3, 3)
    mean, std = (torch.tensor(config.get(name, default))[:, None, None] for name, default in
                 (("latents_mean", (0.0,) * 4), ("latents_std", (1.0,) * 4)))  # fmt: skip
    seen = mean_latents(moments, codec.scaling)
    torch.testing.assert_close(seen, (moments[:, 0] - config.get("shift_factor", 0.0) - mean) * 0.5 / std)
    torch.testing.assert_close(codec.scaling.restore(seen), moments[:, 0])
    torch.testing.assert_close(sample_latents(moments, codec.scaling, torch.zeros(2, 4, 3, 3)), seen)
    images = codec.vae.decode(moments[:, 0]).sample
    torch.testing.assert_close(codec.decode_with_gradients(seen), images, atol=1e-4, rtol=1e-4)


def test_sixteen_pixels_and_32_channels(tmp_path):
    small_vae(block_out_channels=(8,) * 5, latent_channels=32).save_pretrained(tmp_path)
    codec = load_vae(str(tmp_path))
    assert (codec.latent_channels, codec.downsampling) == (32, 16)
    assert codec.encode(torch.zeros(1, 3, 32, 48)).shape == (1, 2, 32, 2, 3)
    assert codec.decode(torch.zeros(1, 32, 2, 3)).shape == (1, 3, 32, 48)
    with pytest.raises(ValueError, match="multiples of 16"):
        codec.encode(torch.zeros(1, 3, 24, 32))


def test_autoencoder_without_posterior(tmp_path):
    """AutoencoderDC: its latents are their own samples."""
    levels = {f"{side}_block_out_channels": (8, 8, 16) for side in ("encoder", "decoder")}
    levels |= {f"{side}_layers_per_block": (1, 1, 1) for side in ("encoder", "decoder")}
    levels |= {f"{side}_qkv_multiscales": ((), (), ()) for side in ("encoder", "decoder")}
    vae = AutoencoderDC(**levels, latent_channels=8, scaling_factor=0.4)
    vae.save_pretrained(tmp_path)
    codec, images = load_vae(str(tmp_path)), torch.rand(1, 3, 16, 24)
    assert (codec.latent_channels, codec.downsampling, codec.scaling_factor) == (8, 4, 0.4)
    moments = codec.encode(images)
    with torch.no_grad():
        latents = vae.encode(images).latent
        torch.testing.assert_close(moments[:, 0], latents)
        sampled = sample_latents(moments.half(), codec.scaling, torch.randn(1, 8, 4, 6))
        torch.testing.assert_close(sampled, 0.4 * latents, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(codec.decode(0.4 * latents), vae.decode(latents).sample.clamp(-1, 1))


def test_helpers_take_stacks_of_half_precision_moments():
    moments = torch.randn(3, 5, 2, 4, 2, 2).half()
    means = mean_latents(moments, LatentScaling(scale=0.5))
    assert means.shape == (3, 5, 4, 2, 2)
    assert means.dtype == torch.float32
    torch.testing.assert_close(sample_latents(moments, LatentScaling(scale=0.5), torch.zeros(3, 5, 4, 2, 2)), means)


def test_posterior_is_neither_collapsed_nor_a_point(codec, images):
    moments = codec.encode(images)
    latents = mean_latents(moments, codec.scaling)
    noise = codec.scaling_factor * torch.exp(0.5 * moments[:, 1])
    assert (noise.mean(dim=(0, 2, 3)) < 0.2 * latents.std(dim=(0, 2, 3))).all()
    assert noise.mean() > 1e-3


def test_small_errors_in_latents_stay_small_in_images(codec, images):
    latents = mean_latents(codec.encode(images), codec.scaling)
    noisy = latents + 0.05 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert (codec.decode(noisy) - codec.decode(latents)).square().mean().sqrt() < 0.06


def test_other_precision_keeps_identity_and_float32_results(images):
    codec = load_vae("embedded")
    moments, digest = codec.encode(images[:1, :, :32, :32]), codec.sha256
    assert codec.to(dtype=torch.bfloat16) is codec
    rough = codec.encode(images[:1, :, :32, :32])
    assert codec.sha256 == digest
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough[:, 0], moments[:, 0], atol=0.2 / codec.scaling_factor, rtol=0)


@pytest.mark.parametrize("shape", [(1, 3, 20, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_shape_are_refused(codec, shape):
    with pytest.raises(ValueError, match="multiples of 8"):
        codec.encode(torch.zeros(shape))


def test_latents_with_other_channels_are_refused(codec):
    with pytest.raises(ValueError, match=r"\[B, 4, h, w\]"):
        codec.decode(torch.zeros(1, 3, 4, 4))


# --- one loader for all ---------------------------------------------------------------------------------------------------


def test_a_copied_folder_is_the_same_vae(codec, tmp_path):
    codec.vae.save_pretrained(tmp_path)
    other = load_vae(str(tmp_path))
    assert other.sha256 == codec.sha256
    assert other.scaling_factor == codec.scaling_factor
    other.vae.decoder.conv_in.bias.data[0] += 1e-3
    other.vae.save_pretrained(tmp_path)
    assert load_vae(str(tmp_path)).sha256 != codec.sha256


def test_a_vae_in_the_layout_of_the_published_one(tmp_path):
    """As diffusers published Stable Diffusion's: an early config, early attention names; only its channels are fewer."""
    vae = small_vae(block_out_channels=(32, 32, 64, 64), layers_per_block=2, norm_num_groups=32)
    fields = ("act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block")
    fields += ("norm_num_groups", "out_channels", "sample_size", "up_block_types")
    config = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", **{name: vae.config[name] for name in fields}}
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in vae.state_dict().items():
        for new, old in early.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[key] = value
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    codec = load_vae(str(tmp_path))
    assert (codec.latent_channels, codec.downsampling, codec.scaling_factor) == (4, 8, 0.18215)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(codec.encode(images)[:, 0], vae.eval().encode(images).latent_dist.mean)
    assert codec.decode(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 16, 16)


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"latent_channels": 16}, "latent_channels in config.json is 16, but 4"),
        ({"block_out_channels": (8, 8, 8)}, r"downsampling .* is 4, but 8"),
        ({"in_channels": 1}, "in_channels in config.json is 1, but 3"),
        ({"latents_std": (1.0, 2.0)}, "latents_std has 2 numbers for 4 latent channels"),
        ({"scaling_factor": 0.0}, "scaling_factor and latents_std must be positive"),
    ],
)
def test_vae_of_another_kind_names_folder_and_field(tmp_path, changes, field):
    small_vae(**changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path}.*{field}"):
        load_vae(str(tmp_path), latent_channels=4, downsampling=8)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"_class_name": "AutoencoderTiny"}', r"_class_name .* is AutoencoderTiny"),
        ('{"_class_name": ', "cannot be loaded"),
        (None, r"has no config\.json"),
    ],
)
def test_configs_that_are_no_vaes_are_refused(tmp_path, config, words):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=rf"{tmp_path}.*{words}"):
        load_vae(str(tmp_path))


@pytest.mark.parametrize("damage", ["absent", "cut", "incomplete", "other shapes", "pickled"])
def test_broken_weights_are_refused(tmp_path, damage):
    vae = small_vae()
    vae.save_pretrained(tmp_path)
    weights = tmp_path / WEIGHTS
    state = load_file(weights)
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "incomplete":
        del state["decoder.conv_in.weight"]
        save_file(state, weights, metadata={"format": "pt"})
    elif damage == "other shapes":
        state["decoder.conv_in.weight"] = torch.zeros(3, 4, 3, 3)
        save_file(state, weights, metadata={"format": "pt"})
    else:
        weights.unlink()
        if damage == "pickled":
            torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_vae(str(tmp_path))


def test_hub_name_that_cannot_be_fetched_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"hub:nobody/no-such-vae: not, or not all, in this machine's cache"):
        load_vae("nobody/no-such-vae")


@pytest.mark.parametrize("name", ["", "no-such-folder", "/no/such/folder"])
def test_neither_folder_nor_hub_name(name):
    with pytest.raises(UserError, match="neither"):
        load_vae(name)
