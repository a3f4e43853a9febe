"""Grouped MLPs, in chunks and by grouped products, against one MLP after the other."""

import pytest
import torch
import torch.nn.functional as F

from dpt.models.grouped_mlp import ExpertWeights, grouped_mlp
from tests.models.reference import mlp

D, WIDTH = 8, 16


def reference(x, weights, counts, kind):
    return torch.cat([mlp(rows, kind, weights, e) for e, rows in enumerate(x.split(counts))])


def make(num, kind, biased, dtype):
    columns = 2 * WIDTH if kind == "swiglu" else WIDTH
    shapes = [(num, columns, D), (num, columns), (num, D, WIDTH), (num, D)]
    return ExpertWeights(
        *((0.3 * torch.randn(s, dtype=dtype)).requires_grad_() if len(s) == 3 or biased else None for s in shapes)
    )


@pytest.mark.parametrize("way", ["chunks", "small chunks", "grouped"])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("counts", [[3, 0, 7], [0, 0, 0], [12], [1, 9, 0]], ids=str)
def test_equal_to_one_mlp_after_the_other(monkeypatch, request, way, kind, biased, counts):
    """Values and all gradients; the grouped way is the one of GPUs, which PyTorch can also run here, in float32."""
    torch.manual_seed(0)
    dtype = torch.float32 if way == "grouped" else torch.float64
    if way == "small chunks":
        monkeypatch.setattr("dpt.cpu.chunks._CHUNK", 40)
    if way == "grouped":
        request.getfixturevalue("grouped_products")
    weights = make(len(counts), kind, biased, dtype)
    x = torch.randn(sum(counts), D, dtype=dtype, requires_grad=True)
    leaves = [x, *(w for w in weights if w is not None)]
    seed = torch.randn(sum(counts), D, dtype=dtype)
    ours = grouped_mlp(x, weights, torch.tensor(counts), kind)
    theirs = reference(x, weights, counts, kind)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, seed), torch.autograd.grad(theirs, leaves, seed))


def test_in_bf16_gradients_of_weights_are_rounded_once(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("dpt.cpu.chunks._CHUNK", 40)
    weights = make(1, "swiglu", False, torch.bfloat16)
    x = torch.randn(300, D).bfloat16()
    (ours,) = torch.autograd.grad(grouped_mlp(x, weights, torch.tensor([300]), "swiglu").sum(), weights.w_out)
    (theirs,) = torch.autograd.grad(reference(x, weights, [300], "swiglu").sum(), weights.w_out)
    torch.testing.assert_close(ours, theirs)


def test_only_the_input_and_the_first_product_are_kept():
    weights = make(2, "swiglu", False, torch.float32)
    x = torch.randn(10, D, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        grouped_mlp(x, weights, torch.tensor([4, 6]), "swiglu")
    assert sorted(kept) == sorted([10 * D, 10 * 2 * WIDTH, 2 * D * 2 * WIDTH, 2 * D * WIDTH])


def test_empty_groups_get_zero_gradients_whatever_the_kernel_leaves_there(monkeypatch, grouped_products):
    """pytorch issues 172439 and 193633: `grouped_mm` may not write the weight gradients of empty groups."""
    real = F.grouped_mm

    def careless(a, b, *, offs):
        out = real(a, b, offs=offs)
        if out.dim() == 3:
            out[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = float("nan")
        return out

    monkeypatch.setattr(F, "grouped_mm", careless)
    weights = make(3, "swiglu", False, torch.float32)
    x = torch.randn(10, D)
    grads = torch.autograd.grad(grouped_mlp(x, weights, torch.tensor([4, 0, 6]), "swiglu").sum(), [weights.w_in, weights.w_out])
    for grad in grads:
        assert not grad[1].any()
        assert grad[[0, 2]].isfinite().all()
