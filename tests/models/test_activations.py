"""Activations and their gradients against PyTorch's own, in every layout and precision; what they keep."""

import pytest
import torch

from dpt.models import activations
from tests.models.reference import activated


def assert_pytorchs(hidden, seed, kind, **tolerance):
    """The activation and its gradient, given that of its result; `tolerance` of the gradient."""
    results = []
    for function in (activations.activate, activated):
        leaf = hidden.clone().requires_grad_()  # strides stay
        value = function(leaf, kind)
        results.append((value.detach(), *torch.autograd.grad(value, leaf, seed)))
    (ours, gradient), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, expected, **tolerance)
    return ours, gradient


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("shape", [(3, 5, 16), (1, 2), (0, 4), (1100, 800)], ids=str)  # the last one takes several chunks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_and_gradients_are_pytorchs(kind, shape, dtype):
    torch.manual_seed(0)
    hidden = (3 * torch.randn(shape)).to(dtype)
    seed = torch.randn(activated(hidden, kind).shape).to(dtype)
    value, gradient = assert_pytorchs(hidden, seed, kind)
    torch.testing.assert_close(activations.backward(seed, hidden, kind, again=True), (gradient, value))


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_far_from_zero_nothing_overflows(kind):
    hidden = torch.tensor([-3e4, -200.0, -20.0, -0.0, 0.0, 20.0, 200.0, 3e4]).repeat(2)
    assert_pytorchs(hidden, torch.ones_like(activated(hidden, kind)), kind, rtol=1e-5, atol=1e-5)


def test_strided_input_and_gradient():
    assert_pytorchs(torch.randn(8, 6).t(), torch.ones(8, 6).t(), "gelu")
    assert_pytorchs(torch.randn(6, 8), torch.ones(8, 6).t(), "gelu")


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_only_the_input_is_kept(kind):
    kept = []
    hidden = torch.randn(4, 8).requires_grad_() * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        activations.activate(hidden, kind)
    assert kept == [hidden.data_ptr()]
