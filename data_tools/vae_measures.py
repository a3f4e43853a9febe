"""Figures of a VAE, the model card that reports them, and how a trained VAE is saved."""

import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.vae_images import RESOLUTION, astronaut, synthetic_images
from dpt.data.codec import VAECodec, load_vae, mean_latents
from dpt.tasks import image_to_float

FLOORS_DB = {"rgb": 28.0, "depth": 30.0, "flow": 30.0, "mask": 30.0, "whole": 28.0, "astronaut": 24.0}
"""PSNR that the embedded VAE must reach on images it has not seen, by kind."""
WEIGHTS = "diffusion_pytorch_model.safetensors"


@torch.no_grad()
def centre_latents(vae: Any, images: Tensor) -> float:
    """Give every latent channel mean 0 over `images` without changing any reconstruction; return the latents' std.

    The 1x1 convolutions on both sides of the latents take the shift: means - m, and W (latents + m) + b.
    """
    means = vae.encode(images).latent_dist.mean
    shift = means.mean(dim=(0, 2, 3))
    vae.quant_conv.bias[: shift.numel()] -= shift
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
    return float((means - shift[:, None, None]).std())


def save_vae(vae: Any, images: Tensor, out: Path) -> None:
    """Write config.json, with the scaling factor measured on `images` [N, 3, H, W], and fp16 safetensors to `out`."""
    std = centre_latents(vae, images)
    vae.register_to_config(scaling_factor=round(1.0 / std, 5))
    vae.half().save_pretrained(out)


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image [N, 3, H, W] in [-1, 1], whose peak is 2: float32 [N]."""
    return 10.0 * torch.log10(4.0 / (image - truth).square().mean(dim=(1, 2, 3)))


def measure(codec: VAECodec, scenes: int, *, seed: int = 0) -> dict[str, float]:
    """PSNR in dB by kind (mean over the images of `scenes` unseen scenes) and of the astronaut; latents' std and noise.

    Reconstructions are those of the posterior mean.
    """
    kinds: dict[str, Any] = {
        kind: torch.from_numpy(np.stack([image_to_float(image) for image in images]))
        for kind, images in synthetic_images("val", scenes, seed=seed).items()
    }
    kinds["astronaut"] = torch.from_numpy(astronaut()[None])
    figures: dict[str, float] = {}
    latents, noise = [], []
    for kind, images in kinds.items():
        moments = torch.cat([codec.encode(part) for part in images.split(16)])
        scaled = mean_latents(moments, codec.scaling)
        decoded = torch.cat([codec.decode(part) for part in scaled.split(16)])
        figures[kind] = float(psnr(decoded, images).mean())
        if kind != "astronaut":
            latents.append(scaled)
            noise.append(codec.scaling.scale * torch.exp(0.5 * moments[:, 1]))
    figures["latent_std"] = float(torch.cat(latents).std())
    figures["latent_noise"] = float(torch.cat(noise).square().mean().sqrt())
    return figures


def measure_speed(codec: VAECodec, *, batch: int = 16, repeats: int = 4) -> tuple[float, float]:
    """Images of 128 x 128 px encoded and decoded per second, with torch's threads."""
    images = torch.zeros(batch, 3, RESOLUTION, RESOLUTION)
    latents = mean_latents(codec.encode(images), codec.scaling)
    times = []
    for work, argument in ((codec.encode, images), (codec.decode, latents)):
        work(argument)
        started = time.perf_counter()
        for _ in range(repeats):
            work(argument)
        times.append(batch * repeats / (time.perf_counter() - started))
    return times[0], times[1]


def figures_table(figures: dict[str, float]) -> str:
    """The measured PSNRs beside their floors, as a Markdown table."""
    rows = [f"| {kind} | {figures[kind]:.2f} | {floor:.0f} |" for kind, floor in FLOORS_DB.items()]
    return "\n".join(["| images | PSNR, dB | at least |", "|---|---|---|", *rows])


def missed_floors(figures: dict[str, float]) -> str:
    """One line of the model card for each kind of image below its floor."""
    return "".join(
        f"\n- {kind} images are below what is asked for: {figures[kind]:.2f} of {floor:.0f} dB."
        for kind, floor in FLOORS_DB.items()
        if figures[kind] < floor
    )


def write_card(
    out: Path, command: str, figures: dict[str, float], scenes: int, speed: tuple[float, float], *, note: str
) -> None:
    """Write the model card, README.md: the command that made the weights, a `note` on how they differ from it, the figures."""
    codec = load_vae(str(out))
    size = (out / WEIGHTS).stat().st_size / 1e6
    (out / "README.md").write_text(
        CARD.format(
            channels=codec.vae.config.block_out_channels,
            latent_channels=codec.latent_channels,
            parameters=sum(p.numel() for p in codec.vae.parameters()) / 1e6,
            size=size,
            scaling_factor=codec.scaling_factor,
            command=command,
            note=f"\n{textwrap.fill(note, 120)}\n" if note else "",
            table=figures_table(figures),
            scenes=scenes,
            latent_std=figures["latent_std"],
            latent_noise=figures["latent_noise"],
            encode=speed[0],
            decode=speed[1],
            threads="one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads",
            missed=missed_floors(figures),
        ),
        encoding="utf-8",
    )


CARD = """\
# The embedded VAE with {latent_channels} channels

A small diffusers `AutoencoderKL` (block_out_channels {channels}, one layer per block, no attention): 8x down,
{latent_channels} latent channels, {parameters:.1f} million parameters, {size:.1f} MB as fp16 safetensors. It is there so that
everything runs without a download; for research use `stabilityai/sd-vae-ft-ema`, which loads by the same code
(`dpt.data.codec.load_vae`).

## Made by

    {command}

from the synthetic scenes of `data_tools.synthesis` (training split), the photos that scikit-image and scikit-learn bundle,
without the astronaut, and dead leaves in those photos' colours (`data_tools.vae_leaves`). The loss is the log of each crop's
mean squared error (its PSNR), L1 and a small KL term, weighted as the command says. After training the latents' channels were
centred, which changes no reconstruction.
{note}
## Measured

PSNR of the reconstruction from the posterior mean, mean over images of each kind of {scenes} scenes that were not trained on
(validation split, 128 px), and of the astronaut (256 px). `python -m data_tools.train_vae --evaluate DIR` measures again.

{table}

Scaled by `scaling_factor` = {scaling_factor}, the latents of these images have standard deviation {latent_std:.3f}, the
posterior's noise is {latent_noise:.3f}. Speed at 128 px on {threads} of the machine that trained it:
{encode:.0f} images/s encoded, {decode:.0f} decoded.

## Limits

- It has seen few photos: fine texture of real photos comes out soft.{missed}
"""
