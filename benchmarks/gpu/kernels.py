"""The kernels that a step is made of: attention with each of PyTorch's backends, grouped products, even and uneven."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import harness
from dpt.models import grouped_mlp
from dpt.models.attention import can_use, self_attention, use_backend

ATTENTION = (128, 16, 256, 72)
"""Samples, heads, tokens and channels per head: XL/2 at 256 px."""
GROUPED = (8, 65536, 1024, 8192)
"""Experts, rows, hidden size and columns of the first product: L/2-8E2A, micro-batch 128."""


def measure(rounds: int = 8) -> list[harness.Row]:
    """TFLOP/s of each, forward and backward."""
    cuda = torch.cuda.is_available()
    rows = _attention(ATTENTION if cuda else (1, 2, 16, 8), rounds)
    return rows + _grouped(GROUPED if cuda else (4, 64, 16, 32), rounds)


def _attention(shape: tuple[int, int, int, int], rounds: int) -> list[harness.Row]:
    samples, heads, tokens, size = shape
    device, dtype = harness.device(), torch.bfloat16
    qkv = torch.randn(samples, tokens, 3, heads, size, device=device, dtype=dtype, requires_grad=True)
    seed = torch.randn(samples, heads, tokens, size, device=device, dtype=dtype)
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else (SDPBackend.MATH,)
    actions: dict[str, Callable[[], object]] = {}
    for backend in backends:

        def action(backend: SDPBackend = backend) -> None:
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, k, v).backward(seed)
            qkv.grad = None

        actions[backend.name.removesuffix("_ATTENTION").lower()] = action
    if can_use("triton"):
        actions["cuDNN, our backward pass"] = lambda: _own_attention(qkv, seed)
    flops = 14.0 * samples * heads * tokens * tokens * size  # two products forward, five backward
    return _rates(f"attention {shape}, forward and backward", actions, flops, rounds)


def _own_attention(qkv: Tensor, seed: Tensor) -> None:
    use_backend("triton")
    self_attention(qkv).backward(seed.transpose(1, 2))
    qkv.grad = None
    use_backend("auto")


def _grouped(sizes: tuple[int, int, int, int], rounds: int) -> list[harness.Row]:
    experts, num_rows, size, columns = sizes
    device, dtype = harness.device(), torch.bfloat16
    x, y = (torch.randn(num_rows, n, device=device, dtype=dtype) for n in (size, columns))
    w = torch.randn(experts, columns, size, device=device, dtype=dtype)
    even = torch.full((experts,), num_rows // experts, device=device)
    two = torch.zeros_like(even)
    two[:2] = num_rows // 2
    results = []
    for name, counts in (("even", even), ("all rows on two experts", two)):
        actions: dict[str, Callable[[], object]] = {
            "forward": lambda counts=counts: grouped_mlp._product(x, w.transpose(1, 2), counts),  # type: ignore[misc]
            "gradient of the rows": lambda counts=counts: grouped_mlp._product(y, w, counts),  # type: ignore[misc]
            "gradient of the weights": lambda counts=counts: grouped_mlp._outer(y, x, counts),  # type: ignore[misc]
        }
        results += _rates(f"grouped products {sizes}, {name}", actions, 2.0 * num_rows * size * columns, rounds)
    return results


def _rates(case: str, actions: dict[str, Callable[[], object]], flops: float, rounds: int) -> list[harness.Row]:
    rows = harness.rows(case, harness.interleave(actions, rounds, warmup=3))
    return [row | {"tflops_per_s": flops / row["median_s"] / 1e12} for row in rows]
