"""A Diffusion Transformer, dense or with Mixture-of-Experts blocks, for inference; needs only torch and diffusers.

Written by dpt beside the weights, whose tensors are named after the modules here. B samples, T tokens, D width, C channels.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

_SINES = 128
_BIAS_STEP = 1e-3  # unit of the routing bias, which is stored in whole steps


def sines(positions: Tensor, count: int, denominator: int) -> tuple[Tensor, Tensor]:
    """Sines and cosines [..., count] of positions [...] at frequencies 10000^(-i / denominator)."""
    numbers = torch.arange(count, dtype=positions.dtype, device=positions.device)
    angles = positions[..., None] * torch.exp(-math.log(10000.0) * numbers / denominator)
    return angles.sin(), angles.cos()


def positions(height: int, width: int, size: int, device: Any) -> Tensor:
    """Sin-cos table, float32 [height width, D]: half the channels for the column, half for the row."""

    def axis(length: int) -> Tensor:
        return torch.cat(sines(torch.arange(length, dtype=torch.float64, device=device), size // 4, size // 4), dim=-1)

    columns, rows = axis(width)[None].expand(height, -1, -1), axis(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).reshape(height * width, size).float()


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm of x [B, T, D] without weights, times (1 + scale) plus shift; both [B, D], or [1, D] for all samples."""
    if len(shift) == 1:
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0], eps)
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale[:, None])


def adaln(size: int, parts: int) -> nn.Sequential:
    """Map the conditioning vector [B, D] to shifts, scales and gates [B, parts D]."""
    return nn.Sequential(nn.SiLU(), nn.Linear(size, parts * size))


class PatchEmbed(nn.Module):
    """Patch embedding: latents [B, C, h, w] to tokens [B, T, D]; with several tasks, by each sample's own convolution."""

    def __init__(self, patch_size: int, channels: int, size: int, num_tasks: int) -> None:
        super().__init__()
        self.patch_size, self.num_tasks = patch_size, num_tasks
        if num_tasks:
            self.weight = nn.Parameter(torch.zeros(num_tasks, size, channels, patch_size, patch_size))
            self.bias = nn.Parameter(torch.zeros(num_tasks, size))
        else:
            self.proj = nn.Conv2d(channels, size, patch_size, stride=patch_size)

    def forward(self, x: Tensor, tasks: Tensor) -> Tensor:
        if not self.num_tasks:
            return self.proj(x).flatten(2).transpose(1, 2).contiguous()
        stride, numbers = self.patch_size, tasks.tolist()
        rows = [F.conv2d(x[i : i + 1], self.weight[t], self.bias[t], stride=stride) for i, t in enumerate(numbers)]
        return torch.cat(rows).flatten(2).transpose(1, 2).contiguous()


class Attention(nn.Module):
    """Self-attention with biases and optional query and key norms: [B, T, D] to [B, T, D]."""

    def __init__(self, size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        head = size // num_heads
        self.q_norm, self.k_norm = (nn.LayerNorm(head, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2))
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with GELU between them, and before it a depthwise convolution if `kernel` is its side."""

    def __init__(self, size: int, width: int, kernel: int = 0) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, width), nn.Linear(width, size)
        self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False) if kernel else None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map x [B, T, D], tokens of a grid of rows x columns, to [B, T, D]."""
        x = self.fc1(x)
        if self.conv is not None:
            x = self.conv(x.unflatten(1, grid).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        return self.fc2(F.gelu(x, approximate="tanh"))


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Compute (silu(x W_gate) * x W_up) W_down."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class SharedExpert(nn.Module):
    """The SwiGLU MLP that every token passes through."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(size, 2 * width, bias=False), nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_up.weight, self.down.weight)


class Router(nn.Module):
    """Router: tokens [T, D] to weights float32 [T, K] and indices [T, K] of their experts; computed in float32."""

    def __init__(self, size: int, num_experts: int, top_k: int, gate: str, normalize: bool, biased: bool) -> None:
        super().__init__()
        self.top_k, self.gate, self.normalize = top_k, gate, normalize
        self.weight = nn.Parameter(torch.zeros(num_experts, size))
        if biased:
            self.register_buffer("bias_steps", torch.zeros(num_experts, dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.float(), self.weight.float())
        gates = logits.sigmoid() if self.gate == "sigmoid" else logits.softmax(dim=-1)
        steps = getattr(self, "bias_steps", None)
        experts = (gates if steps is None else gates + _BIAS_STEP * steps).topk(self.top_k, dim=-1).indices
        weights = gates.gather(1, experts)
        return (weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20) if self.normalize else weights), experts


class Experts(nn.Module):
    """The experts' weights, stacked: SwiGLU without biases, or GELU with them."""

    gate_up_weight: Tensor
    down_weight: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    def __init__(self, num_experts: int, size: int, width: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        shapes: dict[str, tuple[int, ...]] = {"gate_up_weight": (2 * width, size), "down_weight": (size, width)}
        if activation == "gelu":
            shapes = {"fc1_weight": (width, size), "fc1_bias": (width,), "fc2_weight": (size, width), "fc2_bias": (size,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(num_experts, *shape)))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        if self.activation == "swiglu":
            return swiglu(x, self.gate_up_weight[expert], self.down_weight[expert])
        hidden = F.gelu(F.linear(x, self.fc1_weight[expert], self.fc1_bias[expert]), approximate="tanh")
        return F.linear(hidden, self.fc2_weight[expert], self.fc2_bias[expert])


class MoE(nn.Module):
    """Mixture of experts: each token passes through its top-k experts, none dropped, and any shared expert."""

    def __init__(self, size: int, width: int, num_experts: int, shared_width: int, activation: str, **router: Any) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate = Router(size, num_experts, **router)
        self.experts = Experts(num_experts, size, width, activation)
        self.shared = SharedExpert(size, shared_width) if shared_width else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.gate(flat)
        out = torch.zeros_like(flat) if self.shared is None else self.shared(flat)
        for expert in range(self.num_experts):
            tokens, slots = (experts == expert).nonzero(as_tuple=True)
            if len(tokens):
                share = weights[tokens, slots, None].to(flat.dtype)
                out.index_add_(0, tokens, share * self.experts(flat[tokens], expert))
        return out.view_as(x)


class Block(nn.Module):
    """Attention and an MLP or experts, each modulated and gated by the conditioning (adaLN-Zero)."""

    def __init__(
        self, size: int, num_heads: int, width: int, kernel: int, qk_norm: bool, eps: float, moe: dict[str, Any]
    ) -> None:
        super().__init__()
        self.eps, self.has_experts = eps, bool(moe)
        self.attn = Attention(size, num_heads, qk_norm)
        if moe:
            self.moe = MoE(size, width, **moe)
        else:
            self.mlp = Mlp(size, width, kernel)
        self.adaLN_modulation = adaln(size, 6)

    def forward(self, x: Tensor, conditioning: Tensor, grid: tuple[int, int]) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(conditioning).chunk(6, dim=1)
        x = torch.addcmul(x, gate_a[:, None], self.attn(modulated_norm(x, shift_a, scale_a)))
        y = modulated_norm(x, shift_m, scale_m, self.eps)
        return torch.addcmul(x, gate_m[:, None], self.moe(y) if self.has_experts else self.mlp(y, grid))


class TimestepEmbedder(nn.Module):
    """Timestep embedding: times [B] to [B, D]."""

    def __init__(self, size: int, features: str) -> None:
        super().__init__()
        self.denominator = _SINES if features == "dit" else _SINES - 1
        self.mlp = nn.Sequential(nn.Linear(2 * _SINES, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, times: Tensor) -> Tensor:
        sine, cosine = sines(times.float(), _SINES, self.denominator)
        return self.mlp(torch.cat([cosine, sine], dim=-1).to(next(self.mlp.parameters()).dtype))


class FinalLayer(nn.Module):
    """A modulated norm and a linear layer to patches: [B, T, D] to [B, T, p p C_out]."""

    def __init__(self, size: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, patch_size * patch_size * channels)
        self.adaLN_modulation = adaln(size, 2)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(conditioning).chunk(2, dim=1)
        return self.linear(modulated_norm(x, shift, scale))


class DptTransformer2DModel(ModelMixin, ConfigMixin):
    """Diffusion Transformer: clean condition then noisy latents, a time and a label to a prediction (then variance values)."""

    _no_split_modules = ["Block"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 8,
        out_channels: int = 8,
        hidden_size: int = 384,
        num_layers: int = 12,
        num_heads: int = 6,
        mlp_width: int = 1536,
        mlp_kernel_size: int = 0,
        num_classes: int = 1000,
        qk_norm: bool = False,
        mlp_norm_eps: float = 1e-6,
        timestep_features: str = "dit",
        num_input_tasks: int = 0,
        num_experts: int = 0,
        top_k: int = 2,
        expert_activation: str = "swiglu",
        router_gate: str = "softmax",
        router_biased: bool = False,
        normalize_top_k: bool = False,
        shared_expert_width: int = 0,
    ) -> None:
        super().__init__()
        experts: dict[str, Any] = {
            "num_experts": num_experts,
            "shared_width": shared_expert_width,
            "activation": expert_activation,
            "top_k": top_k,
            "gate": router_gate,
            "normalize": normalize_top_k,
            "biased": router_biased,
        }
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size, num_input_tasks)
        self.t_embedder = TimestepEmbedder(hidden_size, timestep_features)
        # The last row is the null label's.
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, hidden_size)})
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_width, mlp_kernel_size, qk_norm, mlp_norm_eps, experts if num_experts else {})
            for _ in range(num_layers)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)

    def forward(self, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """Map latents [B, C_in, h, w], times [B] in the convention of training and labels int64 [B] to [B, C_out, h, w].

        Samples that share their time and label may pass both as [1].
        """
        patch, (height, width) = self.config.patch_size, latents.shape[-2:]
        rows, columns = height // patch, width // patch
        first_task = self.config.num_classes - self.config.num_input_tasks
        x = self.x_embedder(latents.to(self.dtype), (labels - first_task).expand(len(latents)))
        x = x + positions(rows, columns, self.config.hidden_size, x.device).to(x.dtype)
        conditioning = self.t_embedder(times) + self.y_embedder["embedding_table"](labels)
        for block in self.blocks:
            x = block(x, conditioning, (rows, columns))
        x = self.final_layer(x, conditioning)
        x = x.reshape(len(x), rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), -1, height, width).to(latents.dtype)
