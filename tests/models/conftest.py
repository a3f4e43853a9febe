"""What several tests of the networks need."""

import pytest


@pytest.fixture
def grouped_products(monkeypatch):
    """Experts compute as on a GPU, with grouped products, which PyTorch can run here too."""
    from dpt.models import mlp

    monkeypatch.setattr(mlp, "_forward_in_pieces", mlp._forward_grouped)
    monkeypatch.setattr(mlp, "_backward_in_pieces", mlp._backward_grouped)
