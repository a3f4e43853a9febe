"""Draw pictures while pre-training: one sample per class, with classifier-free guidance, in a grid."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpt import distributed
from dpt.config.recipe import DptConfig
from dpt.data.codec import VAECodec, load_vae
from dpt.data.manifest import VAERecord
from dpt.diffusion.noise import key_seeds, normal
from dpt.diffusion.samplers import Denoise, guide, make_plan, sample
from dpt.errors import UserError
from dpt.models.dit import DiT
from dpt.tasks import image_to_uint8
from dpt.training.engine import Engine
from dpt.training.fragments import copy_weights


def save_class_samples(engine: Engine, config: DptConfig, vae: VAERecord, size: tuple[int, int], path: Path) -> bool:
    """Sample the classes of `config.sampling` from the averaged weights, and save them as one PNG. Collective.

    Each rank draws its share, one picture at a time, so they are the same on any number of ranks; rank 0 saves them. `vae`: the
    one that made the shards, which `config.data.vae` must be; `size`: (h, w) of the latents. Returns whether there is a picture
    (on rank 0); without the VAE there is none, and training continues.
    """
    labels = class_labels(config)
    mine = list(enumerate(labels))[distributed.rank() :: distributed.world_size()]
    try:
        with distributed.shared_errors():
            codec = load_codec(config, vae) if mine else None
    except UserError as error:
        distributed.log(f"No class samples were drawn: {error}")
        return False
    network = averaged_network(engine, config)
    images: dict[int, np.ndarray] = {}
    if codec is not None:
        codec.to(engine.device)
        for place, label in mine:
            latents = sample_classes(config, network, size, [label])
            images[place] = image_to_uint8(codec.decode(latents)[0].cpu().numpy())
    del network, codec
    drawn = {place: image for part in distributed.gather_objects(images) for place, image in part.items()}
    if not distributed.is_main():
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_grid([drawn[place] for place in range(len(labels))])).save(path)
    except OSError as error:  # a full disk costs pictures, not the run
        distributed.log(f"No class samples were drawn: {error}")
        return False
    return True


def class_labels(config: DptConfig) -> list[int]:
    """The class ids to draw."""
    return config.sampling.labels or list(range(min(8, config.model.num_classes)))


def load_codec(config: DptConfig, vae: VAERecord) -> VAECodec:
    """Load the VAE `config.data.vae` on the CPU in float32. UserError unless it is the one that made the shards."""
    codec = load_vae(config.data.vae, latent_channels=config.model.in_channels)
    if difference := codec.record.difference(dataclasses.asdict(vae)):
        raise UserError(
            f'dpt.data.vae "{config.data.vae}" is not the VAE "{vae.name}" that made the shards ({difference}); set it.'
        )
    return codec


@torch.no_grad()
def averaged_network(engine: Engine, config: DptConfig) -> DiT:
    """The whole network with the averaged weights (first decay; the plain ones if there is none), on the engine's device.

    It is bf16 on GPUs, float32 elsewhere. No token is dropped, so that a picture does not depend on its batch. Collective.
    """
    dtype = torch.bfloat16 if engine.device.type == "cuda" else torch.float32
    with torch.device("meta"):
        network = DiT(dataclasses.replace(config.model, capacity_factor=0.0))
    network.to(dtype).to_empty(device=engine.device).eval()
    copy_weights(engine.deepspeed, engine.optimizer, next(iter(engine.optimizer.ema_decays), "master"), network)
    return network


@torch.no_grad()
def sample_classes(config: DptConfig, network: DiT, size: tuple[int, int], labels: Sequence[int]) -> Tensor:
    """Sample float32 latents [B, C, h, w] of the classes `labels` by guided DDIM, on the network's device, in its precision.

    The initial noise depends on the class alone, so that pictures of different steps are comparable.
    """
    sampling = config.sampling
    parameter = next(network.parameters())
    device, dtype = parameter.device, parameter.dtype
    keys = [str(label) for label in labels]
    seeds = key_seeds(config.training.seed, keys, [0] * len(keys), purpose="class samples").to(device)
    noise = normal(seeds, (config.model.in_channels, *size))
    both = torch.tensor([*labels, *[config.model.num_classes] * len(labels)], device=device)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return network(noisy.to(dtype), timesteps, both[: len(noisy)]).prediction.float()

    denoise: Denoise = predict
    if sampling.guidance_scale != 1.0:
        denoise = guide(
            predict,
            scale=sampling.guidance_scale,
            channels=config.model.in_channels,
            guided_channels=sampling.guidance_channels,
        )
    plan = make_plan(
        config.diffusion,
        num_inference_steps=sampling.num_inference_steps,
        guidance_interval=(sampling.guidance_low, sampling.guidance_high),
    )
    return sample(denoise, noise, plan, unguided=predict)


def _grid(images: list[np.ndarray]) -> np.ndarray:
    """Arrange uint8 [H, W, 3] images in rows of four, with missing ones white."""
    columns = min(4, len(images))
    blank = np.full_like(images[0], 255)
    images = [*images, *[blank] * (-len(images) % columns)]
    return np.concatenate([np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)])
