"""CLIP image embeddings of visible objects, from weights that the user names."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dpt import hub
from dpt.errors import UserError

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Colour statistics used in training all of OpenAI's CLIP models (Radford et al. 2021, released code)."""


class ClipEncoder:
    """A frozen CLIP image tower with its projection. `width`: length of an embedding; `sha256`: hash of its weights."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.size, self.width = int(model.config.image_size), int(model.config.projection_dim)
        digest = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            digest.update(f"{name} {list(value.shape)}\n".encode() + value.float().cpu().numpy().tobytes())
        self.sha256 = digest.hexdigest()

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Embed uint8 [H, W, 3] pictures of objects on white -> float32 [B, D], as the model returns them (not normalised)."""
        device, dtype = self.model.device, self.model.dtype
        inputs = torch.cat([self._input(torch.from_numpy(picture).to(device)) for picture in pictures])
        return self.model(inputs.to(dtype)).image_embeds.float()

    def _input(self, picture: Tensor) -> Tensor:
        """[H, W, 3] -> [1, 3, S, S]: the whole picture on a white square, bicubic with antialiasing, normalised."""
        image = picture.movedim(-1, 0).float() / 255
        _, height, width = image.shape
        side = max(height, width)
        image = F.pad(image, (0, side - width, 0, side - height), value=1.0)
        image = F.interpolate(image[None], (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values, device=image.device)[:, None, None] for values in (_MEAN, _STD))
        return (image - mean) / std


def load_clip(name: str) -> ClipEncoder:
    """Load the image tower from a folder in transformers' layout, or the hub, on the CPU in fp32. Only safetensors are read."""
    try:
        from transformers import CLIPVisionModelWithProjection
    except ImportError as error:
        raise UserError("--clip needs the package transformers; install dpt[clip].") from error
    place = hub.local_path(hub.with_prefix(name), hub.CLIP_FILES)
    try:
        model = CLIPVisionModelWithProjection.from_pretrained(place, use_safetensors=True, dtype=torch.float32)
    except Exception as error:  # the hub client, safetensors and transformers raise a dozen types
        fix = "give a folder with config.json and model.safetensors" if place.exists() else "no such folder is here"
        raise UserError(f"--clip {name}: the image tower cannot be loaded ({hub.one_line(error)}); {fix}.") from error
    return ClipEncoder(model)
