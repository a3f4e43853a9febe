"""Pixel losses against plain formulas, one sample at a time."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dpt.diffusion import pixel_losses as losses


@pytest.fixture
def maps() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    prediction, truth = (torch.randn(4, 17, 22, generator=generator, dtype=torch.float64) for _ in range(2))
    valid = (torch.rand(4, 17, 22, generator=generator) > 0.3).double()
    valid[3] = 0.0
    return prediction, truth, valid


def test_affine_residual_is_that_of_numpys_least_squares(
    maps: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_LEAST_VARIANCE", 0.0)
    prediction, truth, valid = maps
    residual = losses.affine_residual(prediction, truth, valid)
    for p, t, v, r in zip(prediction[:3], truth[:3], valid[:3], residual[:3], strict=True):
        known = v.bool()
        matrix = np.stack([p[known].numpy(), np.ones(int(known.sum()))], axis=1)
        (scale, shift), *_ = np.linalg.lstsq(matrix, t[known].numpy(), rcond=None)
        np.testing.assert_allclose(r[known].numpy(), (scale * p + shift - t)[known].numpy(), atol=1e-10)


def test_errors_are_means_over_valid_pixels(maps: tuple[Tensor, Tensor, Tensor]) -> None:
    residual, _, valid = maps
    known = valid[0].bool()
    assert losses.absolute_error(residual, valid)[0] == pytest.approx(residual[0][known].abs().mean().item())
    assert losses.squared_error(residual, valid)[0] == pytest.approx(residual[0][known].square().mean().item())
    assert losses.absolute_error(residual, valid)[3] == losses.gradient_error(residual, valid)[3] == 0.0


def test_gradient_error_is_the_sum_over_neighbours_of_each_scale(maps: tuple[Tensor, Tensor, Tensor]) -> None:
    residual, _, valid = maps
    expected = 0.0
    for scale in range(4):
        r, v = (x[0].numpy()[:: 2**scale, :: 2**scale] for x in (residual, valid))
        for axis in (0, 1):
            known = np.delete(v, 0, axis) * np.delete(v, -1, axis)
            expected += (np.abs(np.diff(r, axis=axis)) * known).sum() / known.sum() / 4
    assert losses.gradient_error(residual, valid)[0].item() == pytest.approx(expected)


def test_a_flat_prediction_has_a_finite_gradient() -> None:
    prediction = torch.zeros(1, 8, 8, requires_grad=True)
    truth = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
    losses.absolute_error(losses.affine_residual(prediction, truth, torch.ones(1, 8, 8)), torch.ones(1, 8, 8)).sum().backward()
    assert torch.isfinite(prediction.grad).all()


def test_mask_cross_entropy_falls_as_object_and_background_part() -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:6, 2:6] = 1.0
    valid = torch.ones_like(mask)

    def loss(object_grey: float) -> float:
        return losses.mask_cross_entropy(torch.where(mask > 0, object_grey, 255.0), mask, 250.5, valid).item()

    assert loss(100.0) < loss(240.0) < loss(250.0) < loss(255.0)
    assert losses.mask_cross_entropy(torch.full_like(mask, 250.5), mask, 250.5, valid).item() == pytest.approx(np.log(2))
