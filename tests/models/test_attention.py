"""Attention backends against the formula; names that cannot be had are errors."""

import math
import shutil

import pytest
import torch

from dpt.cpu import upcast
from dpt.errors import UserError
from dpt.models import attention as module
from dpt.models.attention import Attention, attention, use_backend
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


@pytest.mark.parametrize("upcasts", [False, True])
def test_scores_have_the_scale_that_is_asked_for(monkeypatch, upcasts):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 10, 16, requires_grad=True) for _ in range(3))
    weights = torch.randn(2, 3, 10, 16)
    if upcasts:  # as on a processor without units for the type
        monkeypatch.setattr(upcast, "_UPCAST", {torch.float32})
    out, expected = attention(q, k, v, 0.05), (q @ k.transpose(-1, -2) * 0.05).softmax(-1) @ v
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (out, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def _back_to_auto():
    yield
    use_backend("auto")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["sdpa", "flash2", "flash3", "flash4"])
def test_gpu_backends_are_the_formula(backend, dtype):
    try:
        use_backend(backend)
    except UserError as error:
        pytest.skip(str(error))
    q, k, v = (torch.randn(2, 4, 256, 72, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    out, expected = attention(q, k, v), formula(*(x.float() for x in (q, k, v)))
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    grads = [torch.autograd.grad(x.float().square().sum(), (q, k, v)) for x in (out, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=5e-2, rtol=5e-2)


@pytest.mark.gpu
@gpu
def test_kernels_are_chosen_in_our_order():
    """cuDNN first in bf16, also inside a compiled graph."""
    q, k, v = (torch.randn(2, 4, 256, 72, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for function in (attention, torch.compile(attention)):
        function(q, k, v)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            function(q, k, v)
            torch.cuda.synchronize()
        assert "cudnn" in " ".join(event.key for event in profiler.key_averages())


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4"])
def test_a_named_backend_that_is_missing_is_an_error(backend):
    if torch.cuda.is_available():
        pytest.skip("may be there on this machine")
    with pytest.raises(UserError, match=f'dpt.attention_backend "{backend}" cannot be used .*choose "sdpa"'):
        use_backend(backend)


def test_auto_says_its_choice():
    assert use_backend("auto").startswith("Attention: ")
    assert use_backend("auto").endswith("(chosen by auto).")


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4"])
def test_a_flash_backend_leaves_fp32_and_cpus_to_sdpa(monkeypatch, backend):
    """Weights trained with FlashAttention are evaluated in fp32, or on a machine without it."""
    monkeypatch.setattr(module, "_chosen", backend)
    q, k, v = (torch.randn(2, 3, 10, 16) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v), formula(q, k, v), atol=1e-5, rtol=1e-5)


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
    check_compiled(VARIANTS[variant], backend, torch.float32)


@pytest.mark.parametrize("fields", [{"shared_expert_width": 32}, {"expert_activation": "gelu"}], ids=["swiglu", "gelu"])
def test_blocks_with_grouped_experts_compile_into_one_graph(fields, grouped_products):
    """As on GPUs: routing, dispatch and experts are traced with the rest of the block."""
    check_compiled({"num_experts": 4, **fields}, "aot_eager", torch.bfloat16, fullgraph=True)


def check_compiled(fields, backend, dtype, **options):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = tiny(**fields).to(dtype)
        if compiled:
            model.compile_blocks(backend=backend, **({"fullgraph": not model.config.num_experts} | options))
        out = model(*batch(model))
        (out.prediction.square().mean() + out.load_balancing_loss + out.router_z_loss).backward()
        results.append([out.prediction, *(p.grad for p in model.parameters())])
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 5e-2}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
