"""Pictures drawn while pre-training: one sample a class, with classifier-free guidance, in a grid."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpt.config.recipe import DptConfig
from dpt.data.codec import VAECodec
from dpt.diffusion.noise import key_seeds, normal
from dpt.diffusion.samplers import Denoise, guide, make_plan, sample
from dpt.models.dit import DiT
from dpt.tasks import image_to_uint8


def draw_classes(
    config: DptConfig, weights: dict[str, Tensor], vae: VAECodec, path: Path, *, device: torch.device, size: tuple[int, int]
) -> None:
    """Sample the classes of `config.sampling` with `weights` (whole, by name) and save them as one PNG.

    `size`: (h, w) of the latents. The initial noise belongs to the class, so that pictures of different steps compare.
    """
    sampling, num_classes = config.sampling, config.model.num_classes
    labels = sampling.labels or list(range(min(8, num_classes)))
    network = DiT(config.model)
    network.load_state_dict(weights, strict=False)
    network.to(device).eval()
    keys = [str(label) for label in labels]
    seeds = key_seeds(config.training.seed, keys, [0] * len(keys), purpose="class samples").to(device)
    noise = normal(seeds, (config.model.in_channels, *size))
    both = torch.tensor([*labels, *[num_classes] * len(labels)], device=device)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return network(noisy, timesteps, both[: len(noisy)]).prediction

    denoise: Denoise = predict
    if sampling.guidance_scale != 1.0:
        denoise = guide(
            predict,
            scale=sampling.guidance_scale,
            channels=config.model.in_channels,
            guided_channels=sampling.guidance_channels,
        )
    plan = make_plan(config.diffusion, num_inference_steps=sampling.num_inference_steps)
    latents = sample(denoise, noise, plan)
    images = [image_to_uint8(image) for image in vae.decode(latents).cpu().numpy()]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_grid(images)).save(path)


def _grid(images: list[np.ndarray]) -> np.ndarray:
    """uint8 [H, W, 3] images in rows of four, missing ones white."""
    columns = min(4, len(images))
    blank = np.full_like(images[0], 255)
    images = [*images, *[blank] * (-len(images) % columns)]
    return np.concatenate([np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)])
