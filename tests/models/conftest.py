"""What several tests of the networks need."""

import pytest


@pytest.fixture
def grouped_products(monkeypatch):
    """Experts compute as on a GPU, with grouped products, which PyTorch can run here too."""
    from dpt.models import grouped_mlp

    monkeypatch.setattr(grouped_mlp, "has_grouped_products", lambda x: True)
