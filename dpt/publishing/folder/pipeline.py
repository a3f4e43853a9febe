"""Depth of single pictures by a Diffusion Transformer: a pipeline that needs only torch, diffusers and numpy.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    depth = pipe(Image.open("room.jpg")).depth[0]

Written by dpt (`dpt export --to diffusers`), as one file because diffusers fetches no others from the hub. Given the same
seed, key, steps and ensemble, it predicts the same as `dpt predict`.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_DEPTH_SPREAD = 4.0
_NO_SETTINGS = ("self", "__class__", "transformer", "scheduler", "vae")


@dataclass
class DptDepthOutput(BaseOutput):
    """Results for each picture at its own size, float32 [H, W]."""

    depth: list[np.ndarray]
    """Depth up to scale and shift, from 0 (near) to 1 (far)."""
    uncertainty: list[np.ndarray]
    """Disagreement of the ensemble, in the depth's units; 0 without one."""


class DptDepthPipeline(DiffusionPipeline):
    """Pipeline that denoises depth latents beside the picture's clean ones, decodes them, and merges an ensemble.

    All settings but the three components come from `model_index.json`: what the network learnt, and the defaults.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any = None,
        vae_name: str = "",
        vae_revision: str = "",
        vae_subfolder: str = "",
        vae_class: str = "AutoencoderKL",
        downsampling: int = 8,
        fit: str = "aspect",
        fit_resolution: int = 0,
        num_conditions: int = 2,
        label: int = 1000,
        depth_code: str = "linear",
        prediction_type: str = "epsilon",
        time_convention: str = "index",
        timestep_spacing: str = "trailing",
        one_step: bool = False,
        initial_noise: str = "random",
        default_steps: int = 50,
        default_ensemble_size: int = 1,
    ) -> None:
        given = dict(locals())
        settings = {name: given[name] for name in given if name not in _NO_SETTINGS}
        super().__init__()
        if vae is None:
            where = {"revision": vae_revision or None, "subfolder": vae_subfolder or None}
            vae = getattr(diffusers, vae_class).from_pretrained(vae_name, **where)
        vae.to(memory_format=torch.channels_last)  # a fifth faster on CPUs, and the layout GPU kernels want
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(**settings)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        *,
        num_inference_steps: int | None = None,
        ensemble_size: int | None = None,
        resolution: int = 0,
        seed: int = 0,
        keys: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 16,
    ) -> DptDepthOutput:
        """Predict depth of pictures (PIL, or uint8 [H, W, 3]; one or a list), each at its own size.

        num_inference_steps, ensemble_size: None: what model_index.json says. resolution: longest side shown to the network, in
        pixels; 0: that of training. seed, keys: select each picture's noise (keys: one string per picture; None: its
        place in the list); generator: draws the noise instead. batch_size: members computed at once.
        """
        images = [_as_array(one) for one in (image if isinstance(image, list | tuple) else [image])]
        keys = [str(number) for number in range(len(images))] if keys is None else list(keys)
        if len(keys) != len(images):
            raise ValueError(f"{len(keys)} keys for {len(images)} pictures; give one for each.")
        steps = num_inference_steps or self.config.default_steps
        members = ensemble_size or self.config.default_ensemble_size
        if self.config.one_step:
            steps, members = 1, members if self.config.initial_noise == "random" else 1
        output = DptDepthOutput(depth=[], uncertainty=[])
        for picture, key in zip(images, keys, strict=True):
            conditions = self._encode(picture, resolution)
            noise = self._noise(conditions.shape[-2:], seed, key, members, generator)
            maps = []
            for part in noise.split(batch_size):
                latents = self._denoise(conditions.expand(len(part), -1, -1, -1), part, steps)
                maps.append(self._decode(latents))
            depth, uncertainty = merge(torch.cat(maps))
            output.depth.append(_resize(depth.cpu().numpy(), picture.shape[:2]))
            output.uncertainty.append(_resize(uncertainty.cpu().numpy(), picture.shape[:2]))
        self.maybe_free_model_hooks()
        return output

    def _encode(self, picture: np.ndarray, resolution: int) -> Tensor:
        """Clean condition latents [1, K C, h, w]: the picture, and the prompt for "all pixels are valid"."""
        factor = self.config.downsampling
        token = factor * self.transformer.config.patch_size
        longest = resolution or self.config.fit_resolution or self.transformer.config.sample_size * factor
        sides = (1, 1) if self.config.fit == "stretch" else picture.shape[:2]
        height, width = (max(token, round(side * longest / max(sides) / token) * token) for side in sides)
        if picture.shape[:2] != (height, width):
            picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(picture, -1, 0), dtype=np.float32) / 127.5 - 1.0)
        shown = torch.stack([pixels, torch.ones_like(pixels)])[: self.config.num_conditions]
        encoded = self.vae.encode(shown.to(self._execution_device, self.vae.dtype))
        mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        scale, shift = self._scaling()
        return ((mean.float() - shift) * scale).flatten(0, 1)[None]

    def _scaling(self) -> tuple[Any, Any]:
        """Scale and shift, numbers or tensors [C, 1, 1]; the network sees (VAE latents - shift) * scale."""
        config = self.vae.config
        scale, shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
        if getattr(config, "latents_std", None):
            scale = scale / torch.tensor(config.latents_std, device=self._execution_device)[:, None, None]
        if getattr(config, "latents_mean", None):
            shift = shift + torch.tensor(config.latents_mean, device=self._execution_device)[:, None, None]
        return scale, shift

    def _noise(self, size: Sequence[int], seed: int, key: str, members: int, generator: torch.Generator | None) -> Tensor:
        """Start of denoising, float32 [N, C, h, w]."""
        shape = (self.vae.config.latent_channels, *size)
        if self.config.initial_noise == "zero":
            noise = torch.zeros(members, *shape)
        elif self.config.initial_noise == "fixed":
            noise = hashed_normal([_digest("fixed noise")], shape).expand(members, *shape)
        elif generator is not None:
            noise = torch.randn(members, *shape, generator=generator, device=generator.device)
        else:
            noise = hashed_normal([_digest(seed, "noise", key, member) for member in range(members)], shape)
        return noise.to(self._execution_device)

    def _denoise(self, conditions: Tensor, noisy: Tensor, steps: int) -> Tensor:
        """Clean latents [N, C, h, w] from noise."""
        total, channels = self.scheduler.config.num_train_timesteps, noisy.shape[1]
        labels = torch.tensor([self.config.label], device=noisy.device)

        def predict(noisy: Tensor, timestep: float) -> Tensor:
            told = {"index": timestep, "scaled_fraction": timestep + 1.0, "fraction": (timestep + 1.0) / total}
            times = torch.tensor([told[self.config.time_convention]], device=noisy.device)
            inputs = torch.cat((conditions, noisy), dim=1).to(self.transformer.dtype)
            return self.transformer(inputs, times, labels).float()[:, :channels]

        kind = self.config.prediction_type
        if self.config.one_step:
            prediction = predict(noisy, total - 1.0)
            return {"sample": prediction, "v_prediction": -prediction, "rectified_flow": noisy - prediction}[kind]
        if kind == "rectified_flow":
            timesteps = self._straight_timesteps(steps, total)
            self.scheduler.set_timesteps(sigmas=[(t + 1.0) / total for t in timesteps], device=noisy.device)
        else:
            sharpen(self.scheduler)
            self.scheduler.set_timesteps(steps, device=noisy.device)
            timesteps = [float(t) for t in self.scheduler.timesteps]
        for timestep, step in zip(self.progress_bar(timesteps), self.scheduler.timesteps, strict=True):
            inputs = noisy if kind == "rectified_flow" else self.scheduler.scale_model_input(noisy, step)
            noisy = self.scheduler.step(predict(inputs, timestep), step, noisy).prev_sample
        return noisy

    def _straight_timesteps(self, steps: int, total: int) -> list[float]:
        """Timesteps in 0..T - 1 on straight paths; whole ones if the network is given the index."""
        whole = np.round if self.config.time_convention == "index" else np.asarray
        if self.config.timestep_spacing == "linspace":
            return [float(t) for t in whole(np.linspace(0, total - 1, steps))[::-1]]
        if self.config.timestep_spacing == "leading":
            return [float(t) for t in (np.arange(steps) * (total // steps))[::-1]]
        return [float(t) for t in whole(total - np.arange(steps) * (total / steps)) - 1]

    def _decode(self, latents: Tensor) -> Tensor:
        """Clean latents [N, C, h, w] to depth [N, H, W] in [0, 1]."""
        scale, shift = self._scaling()
        unscaled = latents / scale + shift
        images = self.vae.decode(unscaled.to(self.vae.dtype)).sample.float().clamp(-1, 1)
        coded = (images.mean(1).clamp(-1, 1) + 1.0) / 2.0
        if self.config.depth_code == "log":
            return (_DEPTH_SPREAD**coded - 1.0) / (_DEPTH_SPREAD - 1.0)
        if self.config.depth_code == "disparity":
            return coded / (_DEPTH_SPREAD - (_DEPTH_SPREAD - 1.0) * coded)
        return coded


# --- pictures -----------------------------------------------------------------------------------------------------------


def _as_array(image: Any) -> np.ndarray:
    """A picture as uint8 [H, W, 3]."""
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture is {array.dtype} {list(array.shape)}; give PIL images or uint8 [H, W, 3].")
    return array


def _resize(values: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """float32 [H, W] to `size` (h, w), bilinear."""
    return np.asarray(Image.fromarray(values).resize((size[1], size[0]), Image.Resampling.BILINEAR))


# --- noise levels -------------------------------------------------------------------------------------------------------


def sharpen(scheduler: Any) -> None:
    """Give DDIM noise levels computed in float64: a product of a thousand float32 factors is 1e-5 off, and the first steps of
    a network that predicts noise divide by small ones."""
    if not isinstance(scheduler, DDIMScheduler) or scheduler.config.trained_betas is not None:
        return
    config, steps = scheduler.config, scheduler.config.num_train_timesteps
    if config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, steps)
    elif config.beta_schedule == "scaled_linear":
        betas = np.linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), steps) ** 2
    else:
        level = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1.0 - level[1:] / level[:-1], 0.999)
    levels = np.cumprod(1.0 - betas)
    if config.rescale_betas_zero_snr:
        root = np.sqrt(levels)
        levels = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    scheduler.alphas_cumprod = torch.from_numpy(levels)
    if not config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]


# --- noise that belongs to a picture's key -------------------------------------------------------------------------------


def _digest(*parts: object) -> int:
    text = "".join(f"{len(str(part))}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply splitmix64's finaliser to uint64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def hashed_normal(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal numbers float32 [N, *shape], each hashed from its seed and position (Box and Muller)."""
    count = math.prod(shape)
    counter = np.arange(1, (count + 1) // 2 + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(np.array(seeds, np.uint64)[:, None] ^ _mix(counter))
    high, low = (torch.from_numpy(part.astype(np.float32)) for part in (bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)))
    radius, angle = torch.sqrt(-2.0 * torch.log((high + 0.5) * 2.0**-32)), low * (2.0 * math.pi * 2.0**-32)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1).flatten(1)
    return pairs[:, :count].reshape(len(seeds), *shape)


# --- ensembles ----------------------------------------------------------------------------------------------------------


def merge(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Merge depth maps [N, H, W], each up to scale and shift, into one in [0, 1] and its uncertainty, [H, W] each.

    Median compilation (Ke et al. 2024): scales and shifts that bring the maps nearest to each other, then the median; the
    uncertainty is the median absolute deviation from it.
    """
    if len(maps) > 1:
        scale, shift = align(maps)
        maps = maps * scale.float()[:, None, None] + shift.float()[:, None, None]
    merged = _median(maps)
    uncertainty = _median((maps - merged).abs())
    low, extent = merged.min(), (merged.max() - merged.min()).clamp(min=1e-6)
    return (merged - low) / extent, uncertainty / extent


def _median(values: Tensor) -> Tensor:
    ordered = values.sort(0).values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def align(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and shifts float64 [N] of maps [N, H, W] that minimise the sum of pairwise RMS differences when the merged map
    goes from 0 to 1: iteratively reweighted least squares on the maps' covariances, from each map's own range."""
    flat = maps.flatten(1)
    members = len(flat)
    means = flat.double().mean(1)
    centred = flat.double() - means[:, None]
    covariance = centred @ centred.mT / flat.shape[1]
    extents = (flat.amax(1) - flat.amin(1)).double()
    condition, scale = extents / members, 1.0 / extents.clamp(min=1e-6)
    best: tuple[float, Tensor, Tensor] = (math.inf, torch.zeros_like(means), torch.zeros_like(means))
    for iteration in range(4):
        if iteration > 0:
            scale = _balanced(covariance, condition)
        shift = -scale * means
        merged = (flat * scale.float()[:, None] + shift.float()[:, None]).sort(0).values[(members - 1) // 2]
        (low, lowest), (high, highest) = merged.min(0), merged.max(0)
        extent = (high - low).double().clamp(min=1e-12)
        cost = float(_distances(covariance, scale).triu(1).sum() / extent)
        if cost < best[0]:
            best = (cost, scale / extent, (shift - low.double()) / extent)
        if iteration > 0:
            condition = (flat[:, highest] - flat[:, lowest]).double() / members
    return best[1], best[2]


def _distances(covariance: Tensor, scale: Tensor) -> Tensor:
    """RMS differences [N, N] of the scaled, centred maps."""
    scaled = covariance * scale[:, None] * scale[None]
    power = scaled.diagonal()
    return (power[:, None] + power[None] - 2.0 * scaled).clamp(min=0.0).sqrt()


def _balanced(covariance: Tensor, condition: Tensor) -> Tensor:
    """Scales [N] with condition . scale = 1 that minimise the sum of RMS differences."""
    power = covariance.diagonal()
    typical = power.mean().clamp(min=1e-30)
    ridge = torch.diag_embed((power < 1e-12 * typical).double()) + 1e-12 * torch.eye(len(power), dtype=power.dtype).to(power)
    scale = _met(condition, torch.rsqrt(power.clamp(min=1e-12 * typical)))
    for _ in range(40):
        weights = 1.0 / _distances(covariance, scale).clamp(min=1e-9 * typical.sqrt())
        weights = weights - torch.diag_embed(weights.diagonal())
        weights = weights / weights.sum().clamp(min=1e-30)
        system = torch.diag_embed(weights.sum(1) * power) - weights * covariance
        scale = _met(condition, torch.linalg.solve(system / typical + ridge, condition))
    return scale


def _met(condition: Tensor, scale: Tensor) -> Tensor:
    """`scale` times what makes condition . scale = 1; 0 where that is impossible."""
    product = (condition * scale).sum()
    return scale / product if abs(float(product)) > 1e-30 else torch.zeros_like(scale)
