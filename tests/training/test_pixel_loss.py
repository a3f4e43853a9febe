"""Losses of decoded predictions: gradients through the frozen decoder, and whole one-step runs, from training to prediction."""

from typing import Any

import numpy as np
import pytest
import torch

from dpt import target_codes, tasks
from dpt.config.recipe import DptConfig
from dpt.config.sections import DiffusionConfig, ModelConfig, PixelLossConfig, Task, TrainingConfig
from dpt.data.codec import VAECodec, load_vae
from dpt.training.pixel_loss import PixelLoss

LATENTS = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
TRUTH = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def codec() -> VAECodec:
    return load_vae("embedded")


def _config(task: Task, *, checkpointing: bool = False, **pixel: Any) -> DptConfig:
    classes = 8 + tasks.num_task_labels(task)
    return DptConfig(
        task=task,
        model=ModelConfig(hidden_size=32, depth=1, num_heads=2, input_size=4, num_classes=classes),
        diffusion=DiffusionConfig(timesteps="last", prediction_type="sample", vlb_weight=0.0),
        training=TrainingConfig(activation_checkpointing=checkpointing),
        pixel_loss=PixelLossConfig(**{"weight": 1.0} | pixel),
    )


def _labels(config: DptConfig, *targets: str) -> torch.Tensor:
    return torch.tensor([tasks.label_id(t, trained_task=config.task, num_classes=config.model.num_classes) for t in targets])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_latents_and_not_the_decoder(codec: VAECodec, checkpointing: bool) -> None:
    config = _config("depth", checkpointing=checkpointing, gradient_weight=0.0, depth="affine_l2")
    latents = LATENTS.clone().requires_grad_(True)
    loss = PixelLoss(config, codec)(latents, TRUTH, _labels(config, *["depth"] * 3), None)
    loss.backward()
    assert not any(p.requires_grad or p.grad is not None for p in codec.vae.parameters())
    step = 0.03 * latents.grad / latents.grad.abs().max()
    nearer = PixelLoss(config, codec)(LATENTS - step, TRUTH, _labels(config, *["depth"] * 3), None)
    assert (loss.item() - nearer.item()) == pytest.approx((step * latents.grad).sum().item(), rel=0.05)


def test_depth_is_scored_after_the_fit_that_evaluation_makes(codec: VAECodec) -> None:
    """Against numpy's least squares on the decoded maps, sample by sample."""
    config = _config("depth", gradient_weight=0.0)
    valid = torch.ones(3, 4, 4, dtype=torch.uint8)
    valid[0, :2] = 0
    loss = PixelLoss(config, codec)(LATENTS, TRUTH, _labels(config, *["depth"] * 3), valid)
    with torch.no_grad():
        found, true = codec.decode_with_gradients(LATENTS).mean(1).numpy(), codec.decode(TRUTH).mean(1).numpy()
    errors = []
    for p, t, v in zip(found, true, valid.numpy(), strict=True):
        known = np.kron(v, np.ones((8, 8))).astype(bool)
        matrix = np.stack([p[known], np.ones(known.sum())], axis=1)
        fit, *_ = np.linalg.lstsq(matrix, t[known], rcond=None)
        errors.append(np.abs(matrix @ fit - t[known]).mean())
    assert loss.item() == pytest.approx(np.mean(errors), rel=0.02)  # the fit of a scale is damped a little


@pytest.mark.parametrize("code", ["log", "disparity"])
def test_coded_depth_is_fitted_as_depth_and_weighed_as_coded(codec: VAECodec, code: str) -> None:
    """A prediction whose depth is the truth's but for scale and shift is perfect, though its code is no affine copy; an error
    counts as it does in the code; and values beyond the code's range are led back."""
    config = _config("depth", gradient_weight=0.0)
    near_half = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(2)) / 2
    truth, halved = (_coded(u, code) for u in (2 * near_half, near_half))
    valid = torch.ones(1, 8, 8)
    loss = PixelLoss(config, codec, codes={"depth": code})
    assert loss._depth(halved, truth, valid).item() < 0.01  # the fit of a scale is damped a little
    assert PixelLoss(config, codec)._depth(halved, truth, valid).item() > 2e-2
    moved = truth + 0.01 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    inside = (truth.abs() < 0.97).all(1).float()
    coded = (moved - truth).mean(1).abs()
    assert loss._depth(moved, truth, inside).item() == pytest.approx(float((coded * inside).sum() / inside.sum()), rel=0.15)
    beyond = torch.full((1, 3, 8, 8), 1.5).requires_grad_(True)
    loss._depth(torch.cat((beyond[..., :4], truth[..., 4:]), -1), truth, valid).sum().backward()
    assert beyond.grad is not None
    assert beyond.grad[..., :4].isfinite().all()
    assert beyond.grad[..., :4].abs().min() > 0


def _coded(unit: torch.Tensor, code: str) -> torch.Tensor:
    """Depth `[1, H, W]` in [0, 1] as an image in a code."""
    growth = 1.0 + (target_codes.DEPTH_SPREAD - 1.0) * unit
    values = (
        growth.log() / np.log(target_codes.DEPTH_SPREAD)
        if code == "log"
        else (1 - 1 / growth) / (1 - 1 / target_codes.DEPTH_SPREAD)
    )
    return (2 * values - 1)[:, None].expand(-1, 3, -1, -1)


def test_a_generalist_scores_each_sample_as_its_own_task(codec: VAECodec) -> None:
    generalist = _config("generalist")
    mixed = PixelLoss(generalist, codec)(LATENTS, TRUTH, _labels(generalist, "whole", "flow_y", "depth"), None)
    alone = []
    for sample, (task, target) in enumerate([("amodal", "whole"), ("flow", "flow_y"), ("depth", "depth")]):
        config, one = _config(task), slice(sample, sample + 1)  # type: ignore[arg-type]
        alone.append(PixelLoss(config, codec)(LATENTS[one], TRUTH[one], _labels(config, target), None))
    torch.testing.assert_close(mixed, torch.stack(alone).mean())


def test_flow_is_scored_in_pixels(codec: VAECodec) -> None:
    config = _config("flow")
    loss = PixelLoss(config, codec)(LATENTS[:1], TRUTH[:1], _labels(config, "flow_x"), None)
    with torch.no_grad():
        u, true = (
            target_codes.decode_flow(image, 0, 32)
            for image in (codec.decode_with_gradients(LATENTS[:1]), codec.decode(TRUTH[:1]))
        )
    assert loss.item() == pytest.approx((u - true).abs().mean().item(), rel=1e-5)
