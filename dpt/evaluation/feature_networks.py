"""Networks that turn images into features: Inception-v3 as published FIDs use it, DINOv2, or a user's own.

Their weights cannot be bundled. A file is read only if its hash is the documented one or one that the user names; only
TorchScript and safetensors are read, so nothing is unpickled.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dpt import distributed, hub
from dpt.data.manifest import file_sha256
from dpt.errors import UserError

INCEPTION = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION}"
"""TorchScript of the Inception-v3 that published FIDs are measured with: ADM's graph, translated by StyleGAN's authors."""
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
DINOV2 = "facebook/dinov2-large"
"""The ViT-L/14 of FD-DINOv2 (Stein et al. 2023) on the hub."""
DINOV2_SHA256 = "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23"
"""sha256 of its model.safetensors, as shown on the hub."""
_SIDE, _SPATIAL_CHANNELS = 299, 7
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of B images, float32, on the CPU."""

    pooled: Tensor
    """Pooled features `[B, D]`."""
    spatial: Tensor | None = None
    """Spatial features `[B, S]`, for sFID (Nash et al. 2021); None: the network has none."""
    probabilities: Tensor | None = None
    """Class probabilities `[B, K]`, for the Inception Score; None: the network has none."""


class FeatureNetwork(ABC):
    """uint8 images `[B, 3, H, W]` -> `Features`. `name` and `sha256` identify it; `resize`: how it resizes its input."""

    resize: str

    def __init__(self, module: Any, name: str, sha256: str) -> None:
        self.module, self.name, self.sha256, self.device = module, name, sha256, distributed.device()

    @abstractmethod
    def __call__(self, images: Tensor) -> Features: ...


def load_features(path: str | Path = "", sha256: str = "") -> FeatureNetwork:
    """Load the network in a TorchScript file, whose hash must be `sha256` (empty: that of StyleGAN's Inception-v3).

    path: empty: torch.hub's cache. StyleGAN's file, or one built like it, gives all features. Any other must turn uint8
    `[B, 3, H, W]` into `[B, D]`, or into a tuple of pooled features, spatial features and probabilities. UserError if the file
    is missing, saying where to fetch it, or if its hash differs.
    """
    file = Path(path) if str(path) else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if not file.is_file():
        raise UserError(f"there is no feature network {str(file)!r}; fetch the TorchScript file {INCEPTION_URL} to there.")
    _check_hash(file, sha256 or INCEPTION_SHA256, "--features-sha256")
    try:
        module = torch.jit.load(str(file), map_location=distributed.device()).eval()
    except RuntimeError as error:
        raise UserError(f"{file}: no TorchScript file ({str(error).splitlines()[0]}); fetch {INCEPTION_URL}.") from error
    kind = Inception if hasattr(module, "layers") and hasattr(module.layers, "mixed_6") else ScriptNetwork
    return kind(module, file.name, sha256 or INCEPTION_SHA256)


def _check_hash(file: Path, wanted: str, option: str) -> None:
    found = file_sha256(file)
    if found != wanted.lower():
        raise UserError(
            f"{file}: its sha256 is {found}, not {wanted}; fetch the file again, or name the hash with {option} if it is meant."
        )


class Inception(FeatureNetwork):
    """StyleGAN's TorchScript of Inception-v3, run layer by layer: one pass gives all features of ADM's evaluator.

    pooled: 2048 ("pool_3"); spatial: the first 7 channels of "mixed_6/conv", 17 x 17, channels last as in ADM's statistics;
    probabilities: 1008, without the output's bias as in ADM. Images are resized internally to 299 x 299 as TensorFlow 1 does.
    UserError if the layers run one by one do not reproduce the whole network's output.
    """

    resize = "bilinear to 299 x 299 inside the network, as TensorFlow 1"

    def __init__(self, module: Any, name: str, sha256: str) -> None:
        super().__init__(module, name, sha256)
        self._check()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        values = (resize_as_tensorflow(images.to(self.device).float(), _SIDE) - 128.0) / 128.0
        spatial = None
        for name, layer in self.module.layers.named_children():
            if name == "mixed_6":
                spatial = layer.conv(values)[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).cpu()
            values = layer(values)
        pooled = values.flatten(1)
        probabilities = torch.softmax(F.linear(pooled, self.module.output.weight), dim=1)
        return Features(pooled=pooled.cpu(), spatial=spatial, probabilities=probabilities.cpu())

    @torch.no_grad()
    def _check(self) -> None:
        image = (torch.arange(3 * 48 * 64) % 251).to(torch.uint8).reshape(1, 3, 48, 64)
        whole = self.module(image.to(self.device), return_features=True).flatten(1).float().cpu()
        layers = self(image).pooled
        if whole.shape != layers.shape or not torch.allclose(whole, layers, rtol=1e-2, atol=1e-3 * float(whole.abs().max())):
            raise UserError(f"{self.name}: its layers do not compute its features; fetch {INCEPTION_URL}.")


def resize_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """float `[B, C, H, W]` -> `[B, C, side, side]`, bilinear with TensorFlow 1's defaults: pixel i is sampled at i H / side,
    without half-pixel centres or antialiasing."""
    for dim in (2, 3):
        length = images.shape[dim]
        place = torch.arange(side, device=images.device, dtype=torch.float64) * (length / side)
        low = place.long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        weight = (place - low).to(images.dtype).reshape([-1 if d == dim else 1 for d in range(4)])
        images = images.index_select(dim, low) * (1 - weight) + images.index_select(dim, high) * weight
    return images


class ScriptNetwork(FeatureNetwork):
    """A user's own TorchScript network."""

    resize = "none outside the network"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        names = [a.name for a in self.module.forward.schema.arguments]
        more = {"return_features": True} if "return_features" in names else {}
        found = self.module(images.to(self.device), **more)
        parts = [p.float().cpu() if isinstance(p, Tensor) else p for p in (found if isinstance(found, tuple) else (found,))]
        if len(parts) not in (1, 3) or not all(isinstance(p, Tensor) and p.ndim == 2 for p in parts):
            raise UserError(
                f"{self.name}: the feature network does not turn images into vectors [B, D], or into a tuple of pooled "
                "features, spatial features and probabilities; give another one."
            )
        return Features(**dict(zip(("pooled", "spatial", "probabilities"), parts, strict=False)))


def load_dinov2(name: str = DINOV2, sha256: str = "") -> FeatureNetwork:
    """Load DINOv2 from a folder in transformers' layout, or by hub name (its cache first).

    Its model.safetensors must have the hash `sha256` (empty: that of facebook/dinov2-large). UserError if it cannot be
    loaded or its hash differs.
    """
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise UserError("--dinov2 needs the package transformers; install dpt[clip].") from error
    folder = hub.local_path(hub.with_prefix(name), hub.CLIP_FILES)
    if not folder.is_dir():
        raise UserError(f"--dinov2 {name}: no such folder is here, and it is no name on the hub; give a folder, or {DINOV2}.")
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"--dinov2 {name}: there is no model.safetensors; give a folder with it, or {DINOV2}.")
    _check_hash(folder / "model.safetensors", sha256 or DINOV2_SHA256, "--dinov2-sha256")
    try:
        model = Dinov2Model.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    except Exception as error:  # transformers and safetensors raise a dozen types
        raise UserError(
            f"--dinov2 {name}: the network cannot be loaded ({hub.one_line(error)}); give a folder, or {DINOV2}."
        ) from error
    return Dinov2(model.eval().requires_grad_(False).to(distributed.device()), name, sha256 or DINOV2_SHA256)


class Dinov2(FeatureNetwork):
    """DINOv2's class token after the last norm, of pictures resized to 224 x 224 as in the code of Stein et al. (2023)."""

    resize = "bicubic to 224 x 224 by Pillow"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        resized = np.stack([np.asarray(p.resize((224, 224), Image.Resampling.BICUBIC)) for p in pictures])
        values = torch.from_numpy(resized).to(self.device).permute(0, 3, 1, 2).float() / 255.0
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (_MEAN, _STD))
        return Features(pooled=self.module((values - mean) / std).last_hidden_state[:, 0].float().cpu())
