"""Attention behind one function: PyTorch's scaled_dot_product_attention, or a FlashAttention release by name."""

import functools
import importlib
import logging
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from dpt.errors import UserError
from dpt.models import products
from dpt.models.products import Linear

Backend = Literal["sdpa", "flash2", "flash3", "flash4"]

_PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
_log = logging.getLogger(__name__)


@functools.cache
def resolve_backend(name: str) -> Backend:
    """The kernel that `name` (ModelConfig.attention_backend) stands for; "auto" logs its choice.

    "auto" is PyTorch's own kernels unless this machine's GPU has a newer FlashAttention installed for it: 4 on Blackwell
    (compute capability 10), 3 on Hopper (9). FlashAttention 3 and 4 take the place of the flash kernel inside
    scaled_dot_product_attention, for the whole process. Raises UserError if a named one cannot be used.
    """
    if name == "auto":
        choice: Backend = "sdpa"
        major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
        newer: Backend | None = "flash4" if major == 10 else "flash3" if major == 9 else None
        if newer and _missing(newer) is None:
            choice = newer
        _log.info("attention backend: %s (chosen by auto)", choice)
        return choice
    if name == "sdpa":
        return "sdpa"
    reason = _missing(name)
    if reason is not None:
        raise UserError(f'dpt.model.attention_backend "{name}" cannot be used ({reason}); install it or choose "sdpa".')
    return name  # type: ignore[return-value]


def _missing(name: str) -> str | None:
    """Why FlashAttention `name` cannot be used here, None if it can; 3 and 4 are switched on in passing."""
    if not torch.cuda.is_available():
        return "it needs a CUDA GPU"
    try:
        if name == "flash2":
            importlib.import_module(_PACKAGES[name])
        else:
            activate_flash_attention_impl("FA" + name[-1])
    except (ImportError, RuntimeError, ValueError) as error:
        return f"{_PACKAGES[name]}: {error}"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(d)) v; q, k, v and the result [B, heads, T, d]. FlashAttention takes bf16 and fp16 only."""
    if backend == "sdpa" or not q.is_cuda:
        return products.attention(q, k, v)
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f'dpt.model.attention_backend "{backend}" takes bf16 or fp16, not {q.dtype}; choose "sdpa" for fp32.')
    if backend == "flash2":
        from flash_attn import flash_attn_func  # an optional package, there only if it was named

        return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # no silent fall back to another kernel
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention with biases and optional per-head LayerNorm of queries and keys: [B, T, D] -> [B, T, D]."""

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False, backend: str = "sdpa") -> None:
        super().__init__()
        head_size = hidden_size // num_heads
        self.num_heads = num_heads
        self.backend = resolve_backend(backend)
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(head_size, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_size, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # Unbound before they are transposed: the three gradients then come together in one pass.
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2))
        out = attention(self.q_norm(q), self.k_norm(k), v, self.backend)
        return self.proj(out.transpose(1, 2).flatten(2))
