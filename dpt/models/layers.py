"""Building blocks of a Diffusion Transformer: embedders, MLPs, modulation and the final layer.

Shape legend: B samples, T tokens (h w / patch_size^2), D hidden_size, C channels, F MLP width, p patch_size.
Attribute names are those of DiT (Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023), so that public
weights map easily.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpt.config.sections import TIMESTEP_FEATURES
from dpt.models.activations import activate
from dpt.models.products import Linear, baddbmm, depthwise, embed_patches, patchify


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm of x [B, T, D] times (1 + scale) plus shift, [B, D] both or [1, D] for all samples (adaLN, DiT section 3.2)."""
    if len(shift) == 1:  # then they are a norm's own weight and bias: one pass
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0], eps)
    return torch.addcmul(shift.unsqueeze(1), F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale.unsqueeze(1))


def sinusoidal_features(positions: Tensor, count: int, denominator: int) -> tuple[Tensor, Tensor]:
    """Sines and cosines, each [..., count], of positions [...] at frequencies 10000^(-i / denominator), in positions' dtype."""
    numbers = torch.arange(count, dtype=positions.dtype, device=positions.device)
    # In this order, as DiT and diffusers do: at t = 999 a frequency's last bit is 6e-5 of an angle.
    angles = positions[..., None] * torch.exp(-math.log(10000.0) * numbers / denominator)
    return angles.sin(), angles.cos()


def position_table(height: int, width: int, hidden_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Fixed 2-D sin-cos table, float32 [height * width, hidden_size], for a grid of tokens in row-major order.

    The first half of the channels encodes the column, the second half the row (DiT's order); positions are whole numbers at
    every size, so a table of a smaller grid is a part of that of a larger one.
    """

    def axis(length: int) -> Tensor:
        positions, count = torch.arange(length, dtype=torch.float64, device=device), hidden_size // 4
        return torch.cat(sinusoidal_features(positions, count, count), dim=-1)

    columns = axis(width)[None, :].expand(height, -1, -1)
    rows = axis(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).reshape(height * width, hidden_size).float()


class PatchEmbed(nn.Module):
    """Latents [B, C, h, w] -> tokens [B, T, D] by one strided convolution."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def reset_parameters(self) -> None:
        """Initialise as a linear layer on flattened patches (DiT)."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.out_channels, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return embed_patches(x, self.proj.weight, self.proj.bias)


class PatchEmbedRouter(nn.Module):
    """A patch embedding with one convolution per task; each sample goes through that of its task.

    The convolutions are one stacked parameter from which each sample's weights are looked up, so every task's weights get a
    gradient (zero where the task is absent) in every step, on every rank, without a loop over masks.
    """

    def __init__(self, num_tasks: int, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(num_tasks, hidden_size, in_channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(num_tasks, hidden_size))

    def reset_parameters(self) -> None:
        """Initialise all tasks' convolutions to the same weights."""
        nn.init.xavier_uniform_(self.weight[0].view(self.weight.shape[1], -1))
        with torch.no_grad():
            self.weight.copy_(self.weight[:1].clone().expand_as(self.weight))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, tasks: Tensor) -> Tensor:
        """x [B, C, h, w], tasks [B] in 0..num_tasks-1 -> tokens [B, T, D]."""
        patches = patchify(x, self.patch_size)  # [B, T, C p p]
        weight = F.embedding(tasks, self.weight.flatten(1)).unflatten(1, (self.weight.shape[1], -1))  # [B, D, C p p]
        return baddbmm(F.embedding(tasks, self.bias).unsqueeze(1), patches, weight.transpose(1, 2))


def unpatchify(x: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Tokens [B, T, p p C] -> latents [B, C, height, width] (the last axis is ordered row, column, channel as in DiT)."""
    p = patch_size
    x = x.reshape(x.shape[0], height // p, width // p, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, height, width)


class TimestepEmbedder(nn.Module):
    """Timesteps [B] (whole or fractional) -> [B, D] through sinusoidal features and a two-layer MLP."""

    def __init__(self, hidden_size: int, features: Literal["dit", "diffusers"] = "dit") -> None:
        super().__init__()
        self.count = TIMESTEP_FEATURES // 2
        self.denominator = self.count if features == "dit" else self.count - 1
        self.mlp = nn.Sequential(Linear(TIMESTEP_FEATURES, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size))

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 0.02 (DiT), zero biases."""
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def forward(self, timesteps: Tensor) -> Tensor:
        sines, cosines = sinusoidal_features(timesteps.float(), self.count, self.denominator)
        return self.mlp(torch.cat([cosines, sines], dim=-1).to(next(self.parameters()).dtype))  # [B, D]


class LabelEmbedder(nn.Module):
    """Labels [B] -> [B, D]; the last row, id num_classes, is the null label of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def reset_parameters(self) -> None:
        """Normal rows of standard deviation 0.02 (DiT)."""
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Mlp(nn.Module):
    """Two linear layers with tanh-approximated GELU between them, preceded by a depthwise convolution if `kernel` is its side:
    [B, T, D] -> [B, T, D].

    The convolution lets neighbouring tokens see each other (Mix-FFN: Xie et al., "SegFormer", 2021, eq. 3; without its bias).
    """

    def __init__(self, hidden_size: int, width: int, kernel: int = 0) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, width)
        self.conv = nn.Conv2d(width, width, kernel, groups=width, bias=False) if kernel else None
        self.fc2 = Linear(width, hidden_size)

    def reset_parameters(self) -> None:
        """Initialise the convolution as the identity, with which the network is the one without it."""
        if self.conv is not None:
            nn.init.dirac_(self.conv.weight, groups=len(self.conv.weight))

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """`grid`: rows and columns of the tokens, for the convolution."""
        x = self.fc1(x)
        if self.conv is not None:
            assert grid is not None
            x = depthwise(x, self.conv.weight, grid)
        return self.fc2(activate(x, "gelu"))


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down without biases (Shazeer, "GLU Variants Improve Transformer", 2020).

    W_gate and W_up are one matrix, gate first, so that x is read once: [..., D] -> [..., D].
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * width, bias=False)
        self.down = Linear(width, hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """Xavier-uniform, each of the three matrices by its own fan."""
        for weight in (*self.gate_up.weight.chunk(2), self.down.weight):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activate(self.gate_up(x), "swiglu"))


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer to patches: x [B, T, D], conditioning [B or 1, D] -> [B, T, p p C_out].

    The linear layer's products are divided by `divisor` (muP), its bias is not.
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, divisor: float = 1.0) -> None:
        super().__init__()
        self.divisor = divisor
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(conditioning).chunk(2, dim=1)
        x = modulated_norm(x, shift, scale)
        return self.linear(x if self.divisor == 1.0 else x / self.divisor)
