"""Attention backends against the formula; names that cannot be had are errors."""

import logging
import math
import shutil

import pytest
import torch

from dpt.errors import UserError
from dpt.models.attention import Attention, attention, resolve_backend
from tests.models.test_dit import VARIANTS, batch, tiny

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def formula(q, k, v):
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


@pytest.mark.parametrize("head_size", [16, 32, 48, 64, 72, 88, 96, 112])
def test_sdpa_is_the_formula(head_size):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 10, head_size, requires_grad=True) for _ in range(3))
    weights = torch.randn(2, 3, 10, head_size)
    out, expected = attention(q, k, v), formula(q, k, v)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (out, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("backend", ["sdpa", "flash2", "flash3", "flash4"])
def test_gpu_backends_are_the_formula(backend):
    try:
        resolved = resolve_backend(backend)
    except UserError as error:
        pytest.skip(str(error))
    q, k, v = (torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.testing.assert_close(
        attention(q, k, v, resolved).float(), formula(*(x.float() for x in (q, k, v))), atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4"])
def test_a_named_backend_that_is_missing_is_an_error(backend):
    if torch.cuda.is_available():
        pytest.skip("may be there on this machine")
    with pytest.raises(UserError, match=f'"{backend}" cannot be used .*choose "sdpa"'):
        tiny(attention_backend=backend)


def test_auto_logs_its_choice(caplog):
    resolve_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="dpt"):
        assert resolve_backend("auto") in ("sdpa", "flash3", "flash4")
    assert "attention backend" in caplog.text


def test_heads_are_split_in_order_and_norms_are_per_head():
    torch.manual_seed(0)
    layer = Attention(12, 3, qk_norm=True)
    for norm in (layer.q_norm, layer.k_norm):
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 12)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    heads = [[z.split(4, dim=-1)[h] for h in range(3)] for z in (q, k, v)]
    parts = [formula(layer.q_norm(a), layer.k_norm(b), c) for a, b, c in zip(*heads, strict=True)]
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(parts, dim=-1)))


slow = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")]


@pytest.mark.parametrize(
    ("variant", "backend"),
    [*((v, "aot_eager") for v in VARIANTS), *(pytest.param(v, "inductor", marks=slow) for v in VARIANTS)],
)
def test_compiled_blocks_compute_the_same(variant, backend):
    """Forward and backward graphs, each block's; dense blocks compile without a graph break (`fullgraph`)."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = tiny(**VARIANTS[variant])
        if compiled:
            model.compile_blocks(backend=backend, fullgraph=not model.config.num_experts)
        out = model(*batch(model))
        (out.prediction.square().mean() + out.load_balancing_loss + out.router_z_loss).backward()
        results.append([out.prediction, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
