"""Images to VAE latents and back: the package's own small VAE, a local one, or one from the hub, all loaded the same way."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpt import hub
from dpt.errors import UserError

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "vae"


def mean_latents(moments: Tensor, scaling_factor: float) -> Tensor:
    """What the network sees in fine-tuning: the scaled posterior mean.

    moments: [..., 2, C, h, w] (mean, log-variance), any float dtype. Returns float32 [..., C, h, w].
    """
    return moments.select(-4, 0).float() * scaling_factor


def sample_latents(moments: Tensor, scaling_factor: float, noise: Tensor) -> Tensor:
    """What the network sees in pre-training: a scaled sample, scaling_factor * (mean + exp(logvar / 2) * noise).

    moments: [..., 2, C, h, w]; noise: [..., C, h, w], standard normal, drawn by the caller from its own seeds (Kingma and
    Welling, "Auto-Encoding Variational Bayes", 2014, section 2.4). Returns float32 [..., C, h, w].
    """
    mean, logvar = moments.float().unbind(-4)
    return (mean + torch.exp(0.5 * logvar) * noise.float()) * scaling_factor


class VAECodec:
    """A frozen diffusers `AutoencoderKL` with the conventions of the shards: unscaled moments in, scaled latents out.

    name: what the user asked for; scaling_factor: 1 / std of the latents; latent_channels: C; downsampling: H / h;
    sha256: hash of the fp32 weights by name, the same for every file format, folder and device the VAE came from.
    """

    def __init__(self, vae: Any, name: str) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.name = name
        self.scaling_factor = float(vae.config.scaling_factor)
        self.latent_channels = int(vae.config.latent_channels)
        self.downsampling = _downsampling(vae.config)
        self.sha256 = _hash_state(vae.state_dict())
        self.vae.to(memory_format=torch.channels_last)  # a fifth faster on CPUs, and what GPUs' kernels want

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "VAECodec":
        """Move the weights, in place; results stay float32 whatever the dtype. Returns self."""
        torch.nn.Module.to(self.vae, device=device, dtype=dtype)  # diffusers' own `to` warns about nothing here
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] in [-1, 1], H and W multiples of `downsampling` -> moments: float32 [B, 2, C, h, w]."""
        height, width = images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != 3 or height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"images have shape {list(images.shape)}; "
                f"the VAE takes [B, 3, H, W] with H and W multiples of {self.downsampling}."
            )
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.logvar], dim=1).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents: [B, C, h, w], scaled (what the network sees) -> images: float32 [B, 3, H, W], clamped to [-1, 1]."""
        return self.decode_with_gradients(latents).clamp(-1, 1).contiguous()

    def decode_with_gradients(self, latents: Tensor) -> Tensor:
        """As `decode`, but differentiable with respect to the latents, and not clamped: what is out of range is led back."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents have shape {list(latents.shape)}; the VAE takes [B, {self.latent_channels}, h, w].")
        unscaled = latents.to(self.vae.device, torch.float32) / self.scaling_factor
        return self.vae.decode(unscaled.to(self.vae.dtype)).sample.float()


def load_vae(name: str = EMBEDDED, *, latent_channels: int = 4, downsampling: int = 8) -> VAECodec:
    """Load "embedded", a folder in diffusers' layout, or a hub name such as "stabilityai/sd-vae-ft-ema", on the CPU in fp32.

    Names on the hub may be bare or as in `dpt.hub`; the codec's `name` then says the commit. Only safetensors are read.
    UserError if there is no such VAE, its files are broken, or it has other latent channels or another downsampling than the
    latents of this package.
    """
    from diffusers import AutoencoderKL

    source = str(EMBEDDED_FOLDER) if name == EMBEDDED else hub.with_prefix(name)
    if hub.is_hub_name(source):
        folder, name = hub.resolve(source, hub.VAE_FILES)
        source = str(folder)
    if not source or not Path(source).is_dir():
        raise UserError(f'VAE "{name}" is neither "embedded", a folder, nor a hub name such as stabilityai/sd-vae-ft-ema.')
    if not (Path(source) / "config.json").is_file():
        raise UserError(f"VAE folder {source} has no config.json; give the folder that save_pretrained wrote.")
    try:
        config = AutoencoderKL.load_config(source)
        _check_config(config, source, latent_channels, downsampling)
        vae, info = AutoencoderKL.from_pretrained(
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
    found = {
        "_class_name": (config.get("_class_name"), "AutoencoderKL"),
        "in_channels": (config.get("in_channels", 3), 3),
        "latent_channels": (config.get("latent_channels", 4), latent_channels),
        "shift_factor": (config.get("shift_factor") or 0, 0),
        "downsampling (2 ** (len(block_out_channels) - 1))": (_downsampling(config), downsampling),
    }
    for field, (value, wanted) in found.items():
        if value != wanted:
            raise UserError(f"VAE {source}: {field} in config.json is {value}, but {wanted} is needed; choose another VAE.")


def _downsampling(config: dict[str, Any]) -> int:
    return 2 ** (len(config.get("block_out_channels", (64,))) - 1)


def _hash_state(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(f"{key} {list(state[key].shape)}\n".encode())
        digest.update(state[key].float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
