"""Small random feature networks as TorchScript, and images to run them on."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dpt.data.manifest import file_sha256


class Random(nn.Module):
    """Pooled features [B, 6], spatial ones [B, 8] and probabilities [B, 5] of a uint8 image, by fixed random matrices."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("pooled", torch.randn(12, 6, generator=generator))
        self.register_buffer("spatial", torch.randn(12, 8, generator=generator))
        self.register_buffer("classes", torch.randn(6, 5, generator=generator))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        means = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255.0, 2).flatten(1)
        pooled = means @ self.pooled
        return pooled, means @ self.spatial, torch.softmax(4.0 * pooled @ self.classes, dim=1)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 9, 1)
        self.other = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.other(x)], 1)


class TinyInception(nn.Module):
    """The shape of StyleGAN's file in small: `layers` with a `mixed_6`, `output`, and a forward pass of its own."""

    def __init__(self, shift: float = 128.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.shift = shift
        layers = OrderedDict(conv=nn.Conv2d(3, 8, 23, 23), mixed_6=Mixed(), pool2=nn.AdaptiveAvgPool2d(1))
        self.layers = nn.Sequential(layers)
        self.output = nn.Linear(12, 5)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        n, channels, height, width = img.shape
        theta = torch.eye(2, 3)
        theta[0, 2] += 1.0 / width - 1.0 / 299
        theta[1, 2] += 1.0 / height - 1.0 / 299
        grid = nn.functional.affine_grid(theta[None].repeat([n, 1, 1]), [n, channels, 299, 299], False)
        x = nn.functional.grid_sample(img.float(), grid, "bilinear", "border", False)
        features = self.layers((x - self.shift) / 128).reshape(n, -1)
        if return_features:
            return features
        bias = None if no_output_bias else self.output.bias
        return nn.functional.linear(features, self.output.weight, bias).softmax(1)


def save_network(module: nn.Module, path: Path) -> tuple[str, str]:
    """The path and the hash of `module` as a TorchScript file."""
    torch.jit.script(module.eval()).save(str(path))
    return str(path), file_sha256(path)


def random_images(count: int, seed: int, level: int = 256, side: int = 6) -> np.ndarray:
    """uint8 `[count, side, side, 3]`."""
    return np.random.default_rng(seed).integers(0, level, (count, side, side, 3), dtype=np.uint8)
