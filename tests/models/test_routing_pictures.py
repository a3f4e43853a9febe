"""Routing reports against counting by hand."""

import numpy as np
import pytest
import torch

from dpt.errors import UserError
from dpt.models.routing_pictures import trace_routing
from tests.models.networks import random_model


def batches(n=2, size=(8, 4)):
    generator = torch.Generator().manual_seed(1)
    for i in range(n):
        yield {
            "noisy_latents": torch.randn(3, 4, *size, generator=generator),
            "timesteps": torch.tensor([0, 499, 999]) if i else torch.tensor([120, 130, 999]),
            "labels": torch.tensor([2, 5, 10]),
        }


def test_counts_shares_and_entropies(tmp_path):
    network = random_model(std=0.2, num_experts=4)
    report = trace_routing(network, batches(), timestep_bins=4)
    expected = sum(network(**batch).tokens_per_expert for batch in batches())
    assert report.tokens_per_expert.tolist() == expected.tolist()
    fractions = expected.double() / expected.sum(1, keepdim=True)
    np.testing.assert_allclose(report.load_entropy, torch.special.entr(fractions).sum(1) / np.log(4))
    assert ((report.token_entropy > 0) & (report.token_entropy < 1)).all()
    assert report.classes.tolist() == [2, 5, 10]
    assert report.share_by_class.shape == (2, 3, 4)
    assert report.share_by_position.shape == (2, 4, 2, 4)
    np.testing.assert_allclose(report.share_by_position.sum(-1), 1)
    assert report.timestep_edges.tolist() == [0, 250, 500, 750, 1000]
    assert np.isnan(report.share_by_timestep[:, 2]).all()  # no timestep in [500, 750)
    last = [{k: v[2:] for k, v in batch.items()} for batch in batches()]  # timestep 999, class 10
    alone = sum(network(**batch).tokens_per_expert for batch in last).double()
    np.testing.assert_allclose(report.share_by_timestep[:, 3], alone / alone.sum(1, keepdim=True))
    np.testing.assert_allclose(report.share_by_class[:, 2], alone / alone.sum(1, keepdim=True))
    files = report.save(tmp_path / "routing")
    assert [f.name for f in files] == ["routing.npz"] + [
        f"{n}.png" for n in ("tokens_per_expert", "share_by_timestep", "share_by_class", "share_by_position")
    ]
    assert all(f.stat().st_size > 0 for f in files)
    with np.load(files[0]) as arrays:
        np.testing.assert_array_equal(arrays["share_by_position"], report.share_by_position)


def test_refusals():
    with pytest.raises(UserError, match="no experts"):
        trace_routing(random_model(), batches())
    with pytest.raises(UserError, match="no batch"):
        trace_routing(random_model(num_experts=4), [])
    with pytest.raises(UserError, match="several sizes"):
        trace_routing(random_model(num_experts=4), [*batches(1), *batches(1, (8, 8))])
