"""Attention behind a single function: PyTorch's scaled_dot_product_attention, or a FlashAttention release by name.

The kernel is a choice of the run, never of the architecture: `use_backend` sets it once for the process, and `attention` picks
by dtype and device at each call, so weights trained with one kernel are read and evaluated with any other.
"""

import importlib
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from dpt.errors import UserError
from dpt.models import products
from dpt.models.products import Linear

try:
    from dpt.models import attention_backward
except ImportError:  # no triton, which PyTorch's builds for GPUs bring along
    attention_backward = None  # type: ignore[assignment]

Backend = Literal["sdpa", "triton", "flash2", "flash3", "flash4"]

_PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
_HALF = (torch.bfloat16, torch.float16)
# On Hopper, forward and backward at 256 tokens and 72 channels a head: cuDNN 0.97 ms, FlashAttention-2 1.57 ms
# (docs/performance.md). PyTorch takes the first that supports the shapes.
_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_chosen: Backend = "sdpa"


def use_backend(name: str) -> str:
    """Set the process's attention kernel to "auto" or a `Backend`; return a line that reports it.

    "auto" is PyTorch's own kernels unless this machine's GPU has a newer FlashAttention installed for it: 4 on Blackwell
    (compute capability 10), 3 on Hopper (9). "triton" is PyTorch's except the backward pass over short sequences on Hopper
    (`dpt.models.attention_backward`); "auto" does not choose it: no whole step with it has been measured yet.
    FlashAttention 3 and 4 replace the flash kernel inside
    scaled_dot_product_attention, for the whole process. Raises UserError if a named one cannot be used.
    """
    global _chosen
    if name == "auto":
        major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
        newer: Backend | None = "flash4" if major == 10 else "flash3" if major == 9 else None
        _chosen = newer if newer and _missing(newer) is None else "sdpa"
    elif name == "sdpa" or (reason := _missing(name)) is None:
        _chosen = name  # type: ignore[assignment]
    else:
        raise UserError(f'dpt.attention_backend "{name}" cannot be used ({reason}); install it or choose "sdpa".')
    kernel = "PyTorch's scaled_dot_product_attention"
    if _chosen == "triton":
        kernel += f", up to {attention_backward.MOST_TOKENS} tokens with our backward pass in 16 bits"
    elif _chosen != "sdpa":
        kernel = f"FlashAttention {_chosen[-1]} in bf16 and fp16"
    return f"Attention: {kernel}{' (chosen by auto)' if name == 'auto' else ''}."


def can_use(name: str) -> bool:
    """Whether the backend "triton", "flash2", "flash3" or "flash4" can be used here."""
    return _missing(name) is None


def _missing(name: str) -> str | None:
    """The reason FlashAttention `name` cannot be used here, None if it can; switches 3 and 4 on as a side effect."""
    if not torch.cuda.is_available():
        return "it needs a CUDA GPU"
    if name == "triton":
        hopper = torch.cuda.get_device_capability()[0] == 9
        return None if attention_backward and hopper else "it needs the package triton and a Hopper GPU"
    try:
        if name == "flash2":
            importlib.import_module(_PACKAGES[name])
        else:
            activate_flash_attention_impl("FA" + name[-1])
    except (ImportError, RuntimeError, ValueError) as error:
        return f"{_PACKAGES[name]}: {error}"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v; q, k, v and the result [B, heads, T, d]; `scale` None: 1 / sqrt(d).

    FlashAttention is used in bf16 and fp16 on GPUs.
    """
    if not q.is_cuda or q.dtype not in _HALF:
        return products.attention(q, k, v, scale)
    if _chosen == "flash2":
        from flash_attn import flash_attn_func  # an optional package, there only if it was named

        parts = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(*parts, softmax_scale=scale).transpose(1, 2)
    order = _ORDER if _chosen in ("sdpa", "triton") else [SDPBackend.FLASH_ATTENTION]  # no silent fall back from a named kernel
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def self_attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """`attention` of queries, keys and values packed in one tensor [B, T, 3, heads, d]; returns [B, T, heads, d]."""
    if _chosen == "triton" and qkv.is_cuda and qkv.dtype in _HALF and attention_backward.serves(qkv):
        return attention_backward.attention(qkv, qkv.shape[-1] ** -0.5 if scale is None else scale)
    # Unbound before they are transposed: the three gradients then come together in one pass.
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return attention(q, k, v, scale).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with biases and optional per-head LayerNorm of queries and keys: [B, T, D] -> [B, T, D].

    `scale` multiplies the scores; None: 1 / sqrt(head size).
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False, scale: float | None = None) -> None:
        super().__init__()
        head_size = hidden_size // num_heads
        self.num_heads = num_heads
        self.scale = scale
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(head_size, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_size, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        if isinstance(self.q_norm, nn.Identity):
            return self.proj(self_attention(qkv, self.scale).flatten(2))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        out = attention(self.q_norm(q), self.k_norm(k), v, self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))
