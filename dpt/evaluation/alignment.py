"""Least-squares scale and shift between a prediction and the truth, which affine-invariant predictions are scored after."""

import numpy as np


def fit_affine(prediction: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift, float64 `[...]`, that minimise the sum of (scale prediction + shift - truth)^2 over valid pixels.

    prediction, truth: float `[..., H, W]`; valid: bool of the same shape, at least one pixel true in each map. In double
    precision and about the means. A constant prediction gets scale 0 and the truth's mean as shift.
    """
    weights = valid.astype(np.float64)
    count = weights.sum(axis=(-2, -1), keepdims=True)
    assert (count > 0).all(), "a map without valid pixels cannot be aligned"
    p, g = np.where(valid, prediction, 0.0).astype(np.float64), np.where(valid, truth, 0.0).astype(np.float64)
    p_mean, g_mean = (x.sum(axis=(-2, -1), keepdims=True) / count for x in (p, g))
    p_centred = (p - p_mean) * weights
    variance = np.square(p_centred).sum(axis=(-2, -1))
    covariance = (p_centred * (g - g_mean)).sum(axis=(-2, -1))
    p_mean, g_mean, count = p_mean[..., 0, 0], g_mean[..., 0, 0], count[..., 0, 0]
    constant = variance <= 1e-14 * count * (1e-300 + np.square(p_mean))
    scale = np.where(constant, 0.0, covariance / np.where(constant, 1.0, variance))
    return scale, g_mean - scale * p_mean
