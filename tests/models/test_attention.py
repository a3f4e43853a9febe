"""Attention backends against the formula; names that cannot be had are errors."""

import shutil

import pytest
import torch

from dpt.cpu import upcast
from dpt.errors import UserError
from dpt.models import attention as module
from dpt.models.attention import attention, self_attention, use_backend
from tests.models.networks import VARIANTS, batch, gradients, random_model

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def formula(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (scale * q @ k.transpose(-1, -2)).softmax(-1) @ v


def with_gradients(function, inputs, weights):
    """The result of a function of `inputs`, and their gradients under a weighted sum of it, in float32."""
    out = function(*inputs).float()
    return out, *torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize("upcasts", [False, True])
@pytest.mark.parametrize(("head_size", "scale"), [*((n, None) for n in (16, 32, 48, 64, 72, 88, 96, 112)), (16, 0.05)])
def test_attention_is_the_formula(monkeypatch, head_size, scale, upcasts):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 10, head_size, requires_grad=True) for _ in range(3)]
    weights = torch.randn(2, 3, 10, head_size)
    if upcasts:  # as on a processor without units for the type
        monkeypatch.setattr(upcast, "_UPCAST", {torch.float32})
    ours, expected = (with_gradients(lambda *x, f=f: f(*x, scale), inputs, weights) for f in (attention, formula))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def _back_to_auto():
    yield
    use_backend("auto")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["sdpa", "triton", "flash2", "flash3", "flash4"])
def test_gpu_backends_are_the_formula(backend, dtype):
    try:
        use_backend(backend)
    except UserError as error:
        pytest.skip(str(error))
    inputs = [torch.randn(2, 4, 256, 72, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    weights = torch.randn(2, 4, 256, 72, device="cuda")
    out, *grads = with_gradients(attention, inputs, weights)
    expected, *wanted = with_gradients(lambda *x: formula(*(y.float() for y in x)), inputs, weights)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(grads, wanted, atol=5e-2, rtol=5e-2)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("tokens", "size"), [(256, 72), (256, 64), (100, 72), (64, 80), (320, 72)])
def test_the_backward_pass_in_triton_is_the_formula(tokens, size, compiled):
    try:
        use_backend("triton")
    except UserError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3, 4, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(2, tokens, 4, size, device="cuda")
    function = torch.compile(self_attention) if compiled else self_attention

    def expected(qkv):
        q, k, v = (part.transpose(1, 2) for part in qkv.double().unbind(2))
        return formula(q, k, v).transpose(1, 2)

    ours, theirs = (with_gradients(f, [qkv], weights) for f in (function, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() < 0.01 * b.norm()
    again = with_gradients(function, [qkv], weights)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_self_attention_is_attention_of_its_parts():
    torch.manual_seed(0)
    qkv = torch.randn(2, 10, 3, 4, 16)
    expected = formula(*(part.transpose(1, 2) for part in qkv.unbind(2))).transpose(1, 2)
    torch.testing.assert_close(self_attention(qkv), expected, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("backend", ["triton", "flash2", "flash3", "flash4"])
def test_a_named_backend_that_is_missing_is_an_error(backend):
    if torch.cuda.is_available():
        pytest.skip("may be there on this machine")
    with pytest.raises(UserError, match=f'dpt.attention_backend "{backend}" cannot be used .*choose "sdpa"'):
        use_backend(backend)


def test_auto_says_its_choice():
    assert use_backend("auto").startswith("Attention: ")
    assert use_backend("auto").endswith("(chosen by auto).")


@pytest.mark.parametrize("backend", ["triton", "flash2", "flash3", "flash4"])
def test_a_named_backend_leaves_fp32_and_cpus_to_sdpa(monkeypatch, backend):
    """Weights trained with FlashAttention are evaluated in fp32, or on a machine without it."""
    monkeypatch.setattr(module, "_chosen", backend)
    q, k, v = (torch.randn(2, 3, 10, 16) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v), formula(q, k, v), atol=1e-5, rtol=1e-5)
    qkv = torch.stack([q, k, v], dim=1).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(self_attention(qkv).transpose(1, 2), formula(q, k, v), atol=1e-5, rtol=1e-5)


slow = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")]


@pytest.mark.parametrize(
    ("variant", "backend"),
    [("router", "aot_eager"), ("swiglu", "aot_eager"), *(pytest.param(v, "inductor", marks=slow) for v in VARIANTS)],
)
def test_compiled_blocks_compute_the_same(variant, backend):
    """Forward and backward graphs of a block; dense ones ("router" too) compile without a graph break (`fullgraph`)."""
    check_compiled(VARIANTS[variant], backend, torch.float32)


@pytest.mark.parametrize("variant", ["swiglu", "gelu"])
def test_blocks_with_grouped_experts_compile_into_one_graph(variant, grouped_products):
    """As on GPUs: routing, dispatch and experts are traced with the rest of the block."""
    check_compiled(VARIANTS[variant], "aot_eager", torch.bfloat16, fullgraph=True)


def check_compiled(fields, backend, dtype, **options):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = random_model(**fields, depth=1).to(dtype)
        if compiled:
            model.compile_blocks(backend=backend, **({"fullgraph": not model.config.num_experts} | options))
        out, grads = gradients(model, batch(model))
        results.append([out.prediction, *grads.values()])
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 5e-2}
    torch.testing.assert_close(*results, **tolerance)
