"""The network's matrix products: PyTorch's own, except in 16 bits on CPUs that cannot multiply them (`dpt.cpu.upcast`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpt.cpu import upcast
from dpt.cpu.upcast import needs_upcast


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products of `dtype` are computed on a device, by which its speed should be measured."""
    return torch.float32 if needs_upcast(torch.empty(0, dtype=dtype, device=device)) else dtype


class Linear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., A] times weight [B, A] transposed, plus bias [B]: [..., B] in x's dtype."""
    return upcast.linear(x, weight, bias) if needs_upcast(x) else F.linear(x, weight, bias)


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a [N, A] times b [A, B] into out [N, B]; not differentiable."""
    if needs_upcast(a):
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


def baddbmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """bias [S, 1, B] plus a [S, N, A] times b [S, A, B], for each of S samples: [S, N, B]."""
    if needs_upcast(a):
        return torch.baddbmm(bias.float(), a.float(), b.float()).to(a.dtype)
    return torch.baddbmm(bias, a, b)


def embed_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Latents [B, C, h, w] by weights [D, C, p, p] at a stride of p, plus bias [D]: tokens [B, T, D]."""
    size = weight.shape[-1]
    if needs_upcast(x):
        return linear(patchify(x, size), weight.flatten(1), bias)
    # Contiguous, or every later sum would keep the convolution's channel-first strides, which norms are slow on.
    return F.conv2d(x, weight, bias, stride=size).flatten(2).transpose(1, 2).contiguous()


def depthwise(x: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens x [B, T, F] of a grid of rows x columns, each channel convolved by its kernel in weight [F, 1, k, k] (k odd, zeros
    beyond the border): [B, T, F]."""
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)  # channels last, as the tokens lie: no copy
    padding = weight.shape[-1] // 2
    if needs_upcast(x):
        image = F.conv2d(image.float(), weight.float(), padding=padding, groups=len(weight)).to(x.dtype)
    else:
        image = F.conv2d(image, weight, padding=padding, groups=len(weight))
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Latents [B, C, h, w] -> [B, T, C p p]: the patches that a strided convolution sees, in its weights' order."""
    p = patch_size
    b, c, h, w = x.shape
    return x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // p), c * p * p)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v by PyTorch's kernels; q, k, v and the result [B, heads, T, d]; `scale` None: 1 / sqrt(d)."""
    return upcast.attention(q, k, v, scale) if needs_upcast(q) else F.scaled_dot_product_attention(q, k, v, scale=scale)
