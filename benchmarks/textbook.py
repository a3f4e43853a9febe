"""Plain PyTorch as in textbooks, for comparison: a DiT, experts picked by boolean masks, one loop over all parameters.

The networks use the public parameter names and compute the same functions as `dpt.models.DiT` with the same weights
(tests check this), each in the most direct way that the papers' own code takes.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpt.config.sections import ModelConfig


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, T, D], shift and scale [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values."""

    def __init__(self, size: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.q_norm, self.k_norm = (nn.LayerNorm(size // heads, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    """Two layers with tanh-approximated GELU."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(size, width), nn.GELU(approximate="tanh"), nn.Linear(width, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """Three matrices without biases."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, width, bias=False), nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Every token repeated for each of its experts; each expert takes its rows by a boolean mask."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, self.top_k, self.normalize = config.hidden_size, config.top_k, config.normalize_top_k
        one = SwiGLU if config.expert_activation == "swiglu" else Mlp
        self.gate = nn.Linear(size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(one(size, config.mlp_width) for _ in range(config.num_experts))
        self.shared_experts = SwiGLU(size, config.shared_expert_width) if config.shared_expert_width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> [B, T, D], and the load-balancing loss."""
        flat = x.reshape(-1, x.shape[-1])
        probs = self.gate(flat).softmax(dim=-1)
        weights, chosen = probs.topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        repeated, slots = flat.repeat_interleave(self.top_k, dim=0), chosen.flatten()
        y = torch.empty_like(repeated)
        for number, expert in enumerate(self.experts):
            y[slots == number] = expert(repeated[slots == number]).to(y.dtype)
        y = (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        fractions = F.one_hot(slots, len(self.experts)).float().mean(dim=0)
        return y, len(self.experts) * (fractions * probs.mean(dim=0)).sum()


class TaskEmbedding(nn.Module):
    """A convolution for each task; the last labels are the tasks'."""

    def __init__(self, tasks: int, first_label: int, channels: int, size: int, patch: int) -> None:
        super().__init__()
        self.first_label = first_label
        self.proj = nn.ModuleDict({f"conv_in_{task + 1}": nn.Conv2d(channels, size, patch, patch) for task in range(tasks)})

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        convolutions = list(self.proj.values())
        return torch.stack([convolutions[label - self.first_label](one) for one, label in zip(x, labels.tolist(), strict=True)])


class Block(nn.Module):
    """Attention and an MLP or experts, modulated and gated by the conditioning."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm1, self.norm2 = (nn.LayerNorm(size, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = Attention(size, config.num_heads, config.qk_norm)
        if config.num_experts:
            self.moe = MoE(config)
        else:
            self.mlp = Mlp(size, config.mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_attn.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        y, loss = modulate(self.norm2(x), shift_mlp, scale_mlp), x.new_zeros(())
        if hasattr(self, "moe"):
            y, loss = self.moe(y)
        else:
            y = self.mlp(y)
        return x + gate_mlp.unsqueeze(1) * y, loss


class DiT(nn.Module):
    """noisy latents [B, C, h, w], timesteps [B], labels [B] -> prediction [B, C_out, h, w], and the balance losses' sum."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, self.patch = config.hidden_size, config.patch_size
        channels = config.in_channels * (1 + config.num_conditions)
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.tasks = config.patch_embed_tasks
        if self.tasks:
            first = config.num_classes - self.tasks
            self.x_embedder: nn.Module = TaskEmbedding(self.tasks, first, channels, size, self.patch)
        else:
            self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, size, self.patch, self.patch)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, size)})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = nn.ModuleDict(
            {
                "norm_final": nn.LayerNorm(size, elementwise_affine=False, eps=1e-6),
                "linear": nn.Linear(size, self.patch**2 * self.out_channels),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size)),
            }
        )
        side = config.input_size // self.patch
        self.register_buffer("pos_embed", _positions(side, size), persistent=False)

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        embedder = self.x_embedder
        x = embedder["proj"](latents) if isinstance(embedder, nn.ModuleDict) else embedder(latents, labels)
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)
        features = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
        c = self.t_embedder["mlp"](features) + self.y_embedder["embedding_table"](labels)
        losses = x.new_zeros(())
        for block in self.blocks:
            x, loss = block(x, c)
            losses = losses + loss
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=1)
        x = self.final_layer["linear"](modulate(self.final_layer["norm_final"](x), shift, scale))
        b, side = x.shape[0], math.isqrt(x.shape[1])
        x = x.reshape(b, side, side, self.patch, self.patch, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(b, self.out_channels, side * self.patch, side * self.patch), losses


def _positions(side: int, size: int) -> Tensor:
    """Fixed sin-cos table [1, side^2, size], columns first."""
    omega = torch.exp(-math.log(10000) * torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1).double() * omega for place in (columns, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


@torch.no_grad()
def update_ema(averages: dict[str, Tensor], model: nn.Module, decay: float = 0.9999) -> None:
    """Update the averages, one parameter after the other."""
    for name, parameter in model.named_parameters():
        averages[name].mul_(decay).add_(parameter, alpha=1 - decay)


def training_step(model: nn.Module, loss: Callable[[], Tensor], *, learning_rate: float = 1e-4) -> Callable[[], None]:
    """Backward pass, AdamW and EMA on `model`, where `loss` runs its forward pass."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    averages = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        update_ema(averages, model)

    return step


def median_compilation(maps: np.ndarray) -> np.ndarray:
    """Depth [N, H, W] of an ensemble -> its aligned median [H, W] in [0, 1] (see `align`)."""
    scale, shift = align(maps)
    median = np.median(scale[:, None, None] * maps + shift[:, None, None], axis=0)
    return ((median - median.min()) / max(np.ptp(median), 1e-6)).astype(np.float32)


def align(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and shifts [N] that align depth [N, H, W] of an ensemble, by numerical minimisation.

    Minimises, over each map's scale and shift, the sum over pairs of RMS differences plus 0.02 (|min| + |1 - max|) of the
    median, from every map scaled to [0, 1], in two iterations of BFGS (Ke et al. 2024, section 3.3, its code's settings).
    """
    count = len(maps)
    low, extent = maps.min(axis=(1, 2)), np.ptp(maps, axis=(1, 2))
    scale = 1.0 / np.maximum(extent, 1e-6)

    def aligned(values: np.ndarray) -> np.ndarray:
        return values[:count, None, None] * maps + values[count:, None, None]

    def objective(values: np.ndarray) -> float:
        found = aligned(values)
        pairs = sum(np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(found, 2))
        median = np.median(found, axis=0)
        return float(pairs + 0.02 * (abs(median.min()) + abs(1.0 - median.max())))

    start = np.concatenate([scale, -scale * low]).astype(np.float64)
    if count > 1:
        start = scipy.optimize.minimize(objective, start, method="BFGS", tol=1e-3, options={"maxiter": 2}).x
    return start[:count], start[count:]
