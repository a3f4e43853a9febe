"""Losses of decoded predictions, with which one-step networks are trained end to end through the frozen decoder.

Martin Garcia et al. 2024, "Fine-Tuning Image-Conditional Diffusion Models is Easier than You Think", section 4. Maps
are float32 `[B, H, W]`, `valid` too (1 where a pixel counts); losses are one number per sample, `[B]`, 0 without a valid pixel.
"""

import torch
from torch import Tensor
from torch.nn import functional

_LEAST_VARIANCE = 1e-3
"""Variance of a predicted map in [-1, 1] below which the fit of its scale is damped, so a flat map's gradient stays finite."""
GRADIENT_SCALES = 4
"""Number of scales, each half as fine as the one before."""
MASK_SHARPNESS = 0.25
"""Logits per grey level (0-255) from the threshold between object and white background."""


def affine_residual(prediction: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """scale prediction + shift - truth `[B, H, W]`, with each sample's scale and shift by least squares on its valid pixels."""
    count = valid.sum((-2, -1), keepdim=True).clamp(min=1.0)
    mean_prediction, mean_truth = (((x * valid).sum((-2, -1), keepdim=True) / count) for x in (prediction, truth))
    centred, centred_truth = prediction - mean_prediction, truth - mean_truth
    variance = (centred.square() * valid).sum((-2, -1), keepdim=True) / count
    covariance = (centred * centred_truth * valid).sum((-2, -1), keepdim=True) / count
    return covariance / (variance + _LEAST_VARIANCE) * centred - centred_truth


def absolute_error(residual: Tensor, valid: Tensor) -> Tensor:
    """Mean absolute residual over valid pixels `[B]`."""
    return _mean(residual.abs(), valid)


def squared_error(residual: Tensor, valid: Tensor) -> Tensor:
    """Mean squared residual over valid pixels `[B]`."""
    return _mean(residual.square(), valid)


def gradient_error(residual: Tensor, valid: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring residuals in both directions, over scales `[B]`: penalises misplaced edges.

    Li and Snavely 2018, "MegaDepth", eq. 3, on residuals instead of logarithms (as Ranftl et al. 2020, "MiDaS", eq. 11);
    mean over scales.
    """
    total = torch.zeros_like(residual[:, 0, 0])
    for scale in range(GRADIENT_SCALES):
        step = 2**scale
        part, known = residual[:, ::step, ::step], valid[:, ::step, ::step]
        for axis in (1, 2):
            length = part.shape[axis] - 1
            before, after = (x.narrow(axis, 0, length) for x in (part, known))
            next_part, next_known = (x.narrow(axis, 1, length) for x in (part, known))
            total = total + _mean((next_part - before).abs(), next_known * after)
    return total / GRADIENT_SCALES


def mask_cross_entropy(grey: Tensor, mask: Tensor, threshold: float, valid: Tensor) -> Tensor:
    """Cross-entropy, in nats per pixel, of the object's mask (1 inside) under a soft threshold of grey levels (0-255) `[B]`."""
    logits = (threshold - grey) * MASK_SHARPNESS
    return _mean(functional.binary_cross_entropy_with_logits(logits, mask, reduction="none"), valid)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    return (values * valid).sum((-2, -1)) / valid.sum((-2, -1)).clamp(min=1.0)
