"""Pictures drawn while pre-training: one sample a class, with classifier-free guidance, in a grid."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpt import distributed
from dpt.config.recipe import DptConfig
from dpt.data.codec import load_vae
from dpt.data.manifest import VAERecord
from dpt.diffusion.noise import key_seeds, normal
from dpt.diffusion.samplers import Denoise, guide, make_plan, sample
from dpt.errors import UserError
from dpt.models.dit import DiT
from dpt.tasks import image_to_uint8
from dpt.training.engine import Engine
from dpt.training.fragments import gather_weights, persistent_buffers


def draw_classes(engine: Engine, config: DptConfig, vae: VAERecord, size: tuple[int, int], path: Path) -> bool:
    """Sample the classes of `config.sampling` from the averaged weights, and save them as one PNG. Collective; rank 0 draws.

    `vae`: the one that made the shards, which `config.data.vae` must be; `size`: (h, w) of the latents. Returns whether a
    picture was drawn (on rank 0); without the VAE there is none, and training goes on.
    """
    state = next(iter(engine.optimizer.ema_decays), "master")
    weights = gather_weights(engine.deepspeed, engine.optimizer, state)
    drawn = False
    if distributed.is_main():
        network = DiT(config.model)
        network.load_state_dict({**weights, **persistent_buffers(engine.module)})
        try:
            codec = load_vae(config.data.vae, latent_channels=config.model.in_channels).to(engine.device)
            if codec.sha256 != vae.sha256:
                raise UserError(f'dpt.data.vae "{config.data.vae}" is not the VAE "{vae.name}" that made the shards; set it.')
            latents = sample_classes(config, network.to(engine.device).eval(), size)
            images = [image_to_uint8(image) for image in codec.decode(latents).cpu().numpy()]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_grid(images)).save(path)
            drawn = True
        except (UserError, OSError) as error:  # a full disk costs pictures, not the run
            distributed.log(f"No class samples were drawn: {error}")
    distributed.barrier()
    return drawn


def sample_classes(config: DptConfig, network: DiT, size: tuple[int, int]) -> Tensor:
    """Latents float32 [B, C, h, w] of the classes of `config.sampling`, DDIM with guidance, on the network's device.

    The initial noise belongs to the class, so that pictures of different steps compare.
    """
    sampling, num_classes = config.sampling, config.model.num_classes
    labels = sampling.labels or list(range(min(8, num_classes)))
    device = next(network.parameters()).device
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
    return sample(denoise, noise, make_plan(config.diffusion, num_inference_steps=sampling.num_inference_steps))


def _grid(images: list[np.ndarray]) -> np.ndarray:
    """uint8 [H, W, 3] images in rows of four, missing ones white."""
    columns = min(4, len(images))
    blank = np.full_like(images[0], 255)
    images = [*images, *[blank] * (-len(images) % columns)]
    return np.concatenate([np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)])
