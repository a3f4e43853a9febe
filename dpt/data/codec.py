"""Images to VAE latents and back: the package's own small VAE, a local one, or one from the hub, all loaded the same way."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpt import hub
from dpt.data.manifest import VAERecord
from dpt.embedded import EMBEDDED_VAES
from dpt.errors import UserError

KINDS = ("AutoencoderKL", "AutoencoderDC")
"""Supported diffusers classes."""
_LEAST_LOGVAR = -30.0


@dataclass(frozen=True, kw_only=True)
class LatentScaling:
    """Scaling of a VAE's latents for networks: (latents - shift) * scale. Numbers, or tensors `[C, 1, 1]`, one per channel."""

    scale: float | Tensor = 1.0
    shift: float | Tensor = 0.0

    @classmethod
    def of(cls, vae: VAERecord) -> "LatentScaling":
        """Scaling by diffusers' conventions: scale scaling_factor (/ latents_std), shift shift_factor (+ latents_mean)."""
        scale: float | Tensor = vae.scaling_factor
        shift: float | Tensor = vae.shift_factor
        if vae.latents_std:
            scale = scale / torch.tensor(vae.latents_std)[:, None, None]
        if vae.latents_mean:
            shift = shift + torch.tensor(vae.latents_mean)[:, None, None]
        return cls(scale=scale, shift=shift)

    def to(self, device: torch.device | str | None) -> "LatentScaling":
        """The same on a device."""
        scale, shift = (value.to(device) if isinstance(value, Tensor) else value for value in (self.scale, self.shift))
        return LatentScaling(scale=scale, shift=shift)

    def normalize(self, latents: Tensor) -> Tensor:
        """The VAE's latents `[..., C, h, w]` -> the networks' latents, float32."""
        scaling = self.to(latents.device)
        return (latents.float() - scaling.shift) * scaling.scale

    def restore(self, latents: Tensor) -> Tensor:
        """The networks' latents `[..., C, h, w]` -> the VAE's latents, float32."""
        scaling = self.to(latents.device)
        return latents.float() / scaling.scale + scaling.shift


def mean_latents(moments: Tensor, scaling: LatentScaling) -> Tensor:
    """The network's latents in fine-tuning: the scaled posterior mean.

    moments: [..., 2, C, h, w] (mean, log-variance), any float dtype. Returns float32 [..., C, h, w].
    """
    return scaling.normalize(moments.select(-4, 0))


def sample_latents(moments: Tensor, scaling: LatentScaling, noise: Tensor) -> Tensor:
    """The network's latents in pre-training: a scaled sample, mean + exp(logvar / 2) * noise.

    moments: [..., 2, C, h, w]; noise: [..., C, h, w], standard normal, drawn by the caller from its own seeds (Kingma and
    Welling, "Auto-Encoding Variational Bayes", 2014, section 2.4). Returns float32 [..., C, h, w].
    """
    mean, logvar = moments.float().unbind(-4)
    return scaling.normalize(mean + torch.exp(0.5 * logvar) * noise.float())


class VAECodec:
    """A frozen diffusers autoencoder with the conventions of the shards: unscaled moments in, scaled latents out.

    record: its description in manifests and weights; its `name` (what the user asked for), `sha256`, `scaling_factor` (with
    statistics by channel, only a part of `scaling`), `latent_channels` (C) and `downsampling` (H / h) are attributes here too.
    The hash is of the fp32 weights by name, the same for every file format, folder and device the VAE came from.
    """

    def __init__(self, vae: Any, name: str) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.record = record = _record(vae.config, name, _hash_state(vae.state_dict()))
        self.name, self.sha256, self.scaling_factor = record.name, record.sha256, record.scaling_factor
        self.latent_channels, self.downsampling = record.latent_channels, record.downsampling
        self.scaling = LatentScaling.of(record)
        self.vae.to(memory_format=torch.channels_last)  # a fifth faster on CPUs, and what GPUs' kernels want

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "VAECodec":
        """Move the weights in place; results stay float32 whatever the dtype. Returns self."""
        torch.nn.Module.to(self.vae, device=device, dtype=dtype)  # diffusers' own `to` warns about nothing here
        if device is not None:
            self.scaling = self.scaling.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] in [-1, 1], H and W multiples of `downsampling` -> moments: float32 [B, 2, C, h, w].

        An autoencoder without a posterior (`AutoencoderDC`) has the lowest log-variance that diffusers uses, -30.
        """
        height, width = images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != 3 or height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"images have shape {list(images.shape)}; "
                f"the VAE takes [B, 3, H, W] with H and W multiples of {self.downsampling}."
            )
        encoded = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        if not hasattr(encoded, "latent_dist"):
            latents = encoded.latent.float()
            return torch.stack([latents, torch.full_like(latents, _LEAST_LOGVAR)], dim=1)
        posterior = encoded.latent_dist
        return torch.stack([posterior.mean, posterior.logvar], dim=1).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents: [B, C, h, w], scaled (what the network sees) -> images: float32 [B, 3, H, W], clamped to [-1, 1]."""
        return self.decode_with_gradients(latents).clamp(-1, 1).contiguous()

    def decode_with_gradients(self, latents: Tensor) -> Tensor:
        """Like `decode`, but differentiable in the latents and not clamped, so that out-of-range values are pulled back."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents have shape {list(latents.shape)}; the VAE takes [B, {self.latent_channels}, h, w].")
        unscaled = self.scaling.restore(latents.to(self.vae.device))
        return self.vae.decode(unscaled.to(self.vae.dtype)).sample.float()


def load_vae(name: str = "embedded", *, latent_channels: int = 0, downsampling: int = 0) -> VAECodec:
    """Load "embedded", "embedded16", a folder in diffusers' layout, or a hub name, on the CPU in fp32.

    Supports `AutoencoderKL` and `AutoencoderDC`; only safetensors are read. Names on the hub may be bare or as in
    `dpt.hub`; the codec's `name` then states the commit. latent_channels, downsampling: required values; 0: any.

    Raises:
        UserError: there is no such VAE, its files are broken, or it is not as required.
    """
    import diffusers

    source = str(EMBEDDED_VAES[name]) if name in EMBEDDED_VAES else hub.with_prefix(name)
    if hub.is_hub_name(source):
        folder, name = hub.resolve(source, hub.VAE_FILES)
        source = str(folder)
    if not source or not Path(source).is_dir():
        raise UserError(
            f'VAE "{name}" is neither "embedded", "embedded16", a folder, nor a hub name such as stabilityai/sd-vae-ft-ema.'
        )
    if not (Path(source) / "config.json").is_file():
        raise UserError(f"VAE folder {source} has no config.json; give the folder that save_pretrained wrote.")
    try:
        config = diffusers.AutoencoderKL.load_config(source)
        _check_config(config, source, latent_channels, downsampling)
        vae, info = getattr(diffusers, config["_class_name"]).from_pretrained(
            source, use_safetensors=True, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # diffusers, safetensors and the hub client raise a dozen types, plain Exception among them
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"VAE {source} cannot be loaded ({reason}); check its files.") from error
    if info["missing_keys"]:
        raise UserError(f"VAE {source} lacks weights, {info['missing_keys'][0]} for one; give the complete safetensors file.")
    return VAECodec(vae, name)


def _check_config(config: dict[str, Any], source: str, latent_channels: int, downsampling: int) -> None:
    if config.get("_class_name") not in KINDS:
        raise UserError(
            f"VAE {source}: _class_name in config.json is {config.get('_class_name')}, but {' or '.join(KINDS)} is needed; "
            "choose another VAE."
        )
    found = _record(config, source, "")
    wanted = {
        "in_channels": (config.get("in_channels", 3), 3),
        "latent_channels": (found.latent_channels, latent_channels or found.latent_channels),
        "downsampling (2 ** (len(block_out_channels) - 1))": (found.downsampling, downsampling or found.downsampling),
    }
    for field, (value, needed) in wanted.items():
        if value != needed:
            raise UserError(f"VAE {source}: {field} in config.json is {value}, but {needed} is needed; choose another VAE.")


def _record(config: Mapping[str, Any], name: str, sha256: str) -> VAERecord:
    """The record for a diffusers config, with its class's defaults; UserError if its statistics do not match its channels."""
    deterministic = config.get("_class_name") == "AutoencoderDC" or "encoder_block_out_channels" in config
    channels = config.get("encoder_block_out_channels", (0,) * 6) if deterministic else config.get("block_out_channels", (64,))
    try:
        return VAERecord(
            name=name,
            sha256=sha256,
            scaling_factor=float(config.get("scaling_factor", 1.0 if deterministic else 0.18215)),
            latent_channels=int(config.get("latent_channels", 32 if deterministic else 4)),
            shift_factor=float(config.get("shift_factor") or 0.0),
            latents_mean=tuple(config.get("latents_mean") or ()),
            latents_std=tuple(config.get("latents_std") or ()),
            downsampling=2 ** (len(channels) - 1),
        )
    except ValueError as error:
        raise UserError(f"VAE {name}: config.json cannot be right: {error}; correct it.") from error


def _hash_state(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(f"{key} {list(state[key].shape)}\n".encode())
        digest.update(state[key].float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
