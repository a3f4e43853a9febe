"""Activations and their gradients against PyTorch's own, in every layout and precision; what they keep."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpt.models import activations


def reference(hidden: Tensor, kind: str) -> Tensor:
    if kind == "gelu":
        return F.gelu(hidden, approximate="tanh")
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def value_and_gradient(function, hidden, seed):
    hidden = hidden.clone().requires_grad_()
    value = function(hidden)
    return value.detach(), torch.autograd.grad(value, hidden, seed)[0]


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("shape", [(3, 5, 16), (1, 2), (0, 4), (1100, 800)], ids=str)  # the last one takes several chunks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_and_gradients_are_pytorchs(kind, shape, dtype):
    torch.manual_seed(0)
    hidden = (3 * torch.randn(shape)).to(dtype)
    seed = torch.randn(reference(hidden, kind).shape).to(dtype)
    ours = value_and_gradient(lambda h: activations.activate(h, kind), hidden, seed)
    theirs = value_and_gradient(lambda h: reference(h, kind), hidden, seed)
    torch.testing.assert_close(ours, theirs)
    d_hidden, again = activations.backward(seed, hidden, kind, again=True)
    torch.testing.assert_close((again, d_hidden), ours)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_far_from_zero_nothing_overflows(kind):
    hidden = torch.tensor([-3e4, -200.0, -20.0, -0.0, 0.0, 20.0, 200.0, 3e4]).repeat(2).requires_grad_()
    output = activations.activate(hidden, kind)
    (grad,) = torch.autograd.grad(output.sum(), hidden)
    expected = reference(hidden, kind)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), hidden)[0], rtol=1e-5, atol=1e-5)


def test_strided_input_and_gradient():
    hidden = torch.randn(8, 6).t().requires_grad_()
    output = activations.activate(hidden, "gelu")
    torch.testing.assert_close(output, reference(hidden, "gelu"))
    torch.testing.assert_close(
        torch.autograd.grad(output, hidden, torch.ones(8, 6).t())[0],
        torch.autograd.grad(reference(hidden, "gelu").sum(), hidden)[0],
    )
    hidden = torch.randn(6, 8).requires_grad_()
    (grad,) = torch.autograd.grad(activations.activate(hidden, "gelu"), hidden, torch.ones(8, 6).t())
    torch.testing.assert_close(grad, torch.autograd.grad(reference(hidden, "gelu").sum(), hidden)[0])


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_only_the_input_is_kept(kind):
    kept = []
    hidden = torch.randn(4, 8).requires_grad_() * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        activations.activate(hidden, kind)
    assert kept == [hidden.data_ptr()]
