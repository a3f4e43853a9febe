"""The options that blocks are compiled with: PyTorch's compiler knows them, and decides as we mean it to."""

import types

import pytest
import sympy
import torch
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

from dpt.models import compiling


@pytest.fixture(autouse=True)
def _own_choices():
    yield
    V.set_choices_handler(InductorChoices())


def test_the_compiler_knows_the_options():
    options = compiling.options()
    assert "max_pointwise_cat_inputs" in options
    torch.compile(torch.nn.Identity(), options=options)  # it refuses an unknown one here, before it compiles


@pytest.mark.parametrize(("length", "hint", "one_pass"), [
    (1024, ReductionHint.INNER, True), (1152, ReductionHint.INNER, True), (4608, ReductionHint.INNER, False),
    (1152, ReductionHint.OUTER, False),
])  # fmt: skip
def test_rows_of_xl_are_normed_in_one_pass(length, hint, one_pass):
    compiling.options()
    features = types.SimpleNamespace(get_reduction_hint=lambda: hint, reduction_numel=sympy.Integer(length))
    sizes = types.SimpleNamespace(statically_known_leq=lambda left, right: bool(left <= right))
    with V.set_graph_handler(types.SimpleNamespace(sizevars=sizes)):
        assert V.choices.should_use_persistent_reduction(features, False) == one_pass
