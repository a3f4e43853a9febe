"""Products of bf16 numbers through float32: rounded once, kept in 16 bits, and none left out of the network."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory import LiveBytes
from dpt.cpu import upcast
from dpt.models import products
from tests.models.networks import VARIANTS, batch, gradients, random_model
from tests.models.test_attention import formula

NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_units(monkeypatch):
    """Whatever this processor has."""
    monkeypatch.setattr(upcast, "_UPCAST", frozenset(NARROW))


def rounded_once(exact, dtype):
    """Tolerance of one rounding, of a sum in float32 whose order is free."""
    return {"rtol": torch.finfo(dtype).eps, "atol": 1e-5 * float(exact.detach().abs().max())}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24)], ids=str)
def test_linear_rounds_once(dtype, biased, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(16, 24).to(dtype).requires_grad_()
    bias = torch.randn(16).to(dtype).requires_grad_() if biased else None
    leaves = [t for t in (x, weight, bias) if t is not None]
    ours, seed = products.linear(x, weight, bias), torch.randn(*shape[:-1], 16).to(dtype)
    assert ours.dtype == dtype
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.nn.functional.linear(*wide)
    torch.testing.assert_close(ours.double(), exact, **rounded_once(exact, dtype))
    gradients = torch.autograd.grad(ours, leaves, seed)
    for leaf, one, expected in zip(leaves, gradients, torch.autograd.grad(exact, wide, seed.double()), strict=True):
        assert one.dtype == dtype
        assert one.shape == leaf.shape
        torch.testing.assert_close(one.double(), expected, **rounded_once(expected, dtype))


def test_only_wanted_gradients_are_computed():
    x, weight = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16().requires_grad_()
    (d_weight,) = torch.autograd.grad(products.linear(x, weight, None).sum(), weight)
    torch.testing.assert_close(d_weight, x.float().sum(0).expand(5, 4).bfloat16())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_attention_is_the_formula(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 10, 16).to(dtype).requires_grad_() for _ in range(3))
    out, seed = products.attention(q, k, v), torch.randn(2, 3, 10, 16).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = formula(*wide)
    torch.testing.assert_close(out.double(), exact, **rounded_once(exact, dtype))
    expected = torch.autograd.grad(exact, wide, seed.double())
    for one, other in zip(torch.autograd.grad(out, (q, k, v), seed), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2)  # the result is kept rounded too


def test_what_is_kept_for_the_backward_pass_is_narrow():
    q, k, v = (torch.randn(1, 2, 64, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    linear, x = products.Linear(16, 16).bfloat16(), torch.randn(64, 16, dtype=torch.bfloat16, requires_grad=True)
    with LiveBytes() as live:
        out = products.attention(q, k, v)
        kept = live.now
        linear(x).sum()
    one = q.numel() * 2
    assert kept <= 6 * one  # queries, keys, values and the result, that which is returned, and the softmax's sums
    assert live.now <= kept + 16  # x and the weight are there anyway
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "share"), [("dense", 0.25), ("swiglu", 0.43)])
def test_activation_checkpointing_keeps_nothing_of_attention(name, share):
    network = random_model(**VARIANTS[name]).bfloat16()
    inputs = batch(network)
    kept, grads = {}, {}
    for enabled in (False, True):
        network.set_activation_checkpointing(enabled)
        with LiveBytes() as live:
            out = network(*inputs)
            kept[enabled] = live.now
        del out
        _, grads[enabled] = gradients(network, inputs)
    assert kept[True] < share * kept[False]  # with what attention keeps: 0.34 and 0.46
    torch.testing.assert_close(grads[True], grads[False], rtol=0, atol=0)


class NoNarrowProducts(TorchDispatchMode):
    """Fails at a matrix product, convolution or attention of numbers of 16 bits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        multiplies = any(part in name for part in ("mm", "conv", "attention", "linear", "dot", "matmul"))
        if multiplies and any(isinstance(t, torch.Tensor) and t.dtype in NARROW for t in tree_leaves((args, kwargs))):
            raise AssertionError(f"{name} of narrow numbers")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", VARIANTS)
def test_all_products_of_a_network_are_upcasts(name, monkeypatch):
    """Training in bf16: the same as with units for it, up to rounding, and no product in bf16 at all."""
    network = random_model(**VARIANTS[name]).bfloat16()
    inputs = batch(network)
    with NoNarrowProducts():
        _, ours = gradients(network, inputs)
    monkeypatch.setattr(upcast, "_UPCAST", frozenset())
    _, theirs = gradients(network, inputs)
    largest = max(float(g.abs().max()) for g in theirs.values())  # a bias of keys changes nothing: its gradient is rounding
    for key, gradient in ours.items():
        scale = max(float(theirs[key].abs().max()), 1e-3 * largest)
        assert float((gradient.float() - theirs[key].float()).abs().max()) <= 0.1 * scale, key


def test_float32_is_left_to_pytorch():
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    assert torch.equal(products.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert not upcast.needs_upcast(x)


def test_blocks_compile_into_one_graph():
    block = random_model().bfloat16().blocks[0]
    x, conditioning = torch.randn(2, 16, 32).bfloat16(), torch.randn(2, 32).bfloat16()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    compiled(x, conditioning)[0].sum().backward()
    torch.testing.assert_close(compiled(x, conditioning)[0], block(x, conditioning)[0], rtol=5e-2, atol=5e-2)


def test_the_speed_of_narrow_products_is_that_of_float32(monkeypatch):
    cpu = torch.device("cpu")
    assert products.product_dtype(torch.bfloat16, cpu) == torch.float32
    monkeypatch.setattr(upcast, "_UPCAST", frozenset())
    assert products.product_dtype(torch.bfloat16, cpu) == torch.bfloat16


@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_depthwise_convolution_sums_the_neighbours_of_each_token(side, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 4 * 6, 8, generator=generator), torch.randn(8, 1, side, side, generator=generator)
    x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    out = products.depthwise(x, weight, (4, 6))
    assert out.dtype == dtype
    assert out.is_contiguous()
    padded = F.pad(x.detach().double().unflatten(1, (4, 6)), (0, 0, *(side // 2,) * 4))
    expected = sum(
        padded[:, row : row + 4, column : column + 6] * weight.detach().double()[:, 0, row, column]
        for row in range(side)
        for column in range(side)
    )
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.double(), expected.flatten(1, 2), **tolerance)
    out.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
