"""Least-squares scale and shift between a prediction and the truth, which affine-invariant predictions are scored after."""

import numpy as np


def fit_affine(prediction: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift, float64 `[...]`, that minimise the sum of (scale prediction + shift - truth)^2 over valid pixels.

    prediction, truth: float `[..., H, W]`; valid: bool of the same shape, at least one pixel true in each map. In double
    precision and about the means. A constant prediction gets scale 0 and the truth's mean as shift.
    """
    leading = prediction.shape[:-2]
    scale, shift = np.empty(leading), np.empty(leading)
    for place in np.ndindex(leading):
        inside = valid[place]
        p, g = prediction[place][inside].astype(np.float64), truth[place][inside].astype(np.float64)
        assert p.size, "a map without valid pixels cannot be aligned"
        p_mean, g_mean = p.mean(), g.mean()
        p -= p_mean
        variance = np.dot(p, p)
        constant = variance <= 1e-14 * p.size * p_mean**2 or variance == 0.0
        scale[place] = 0.0 if constant else np.dot(p, g - g_mean) / variance
        shift[place] = g_mean - scale[place] * p_mean
    return scale, shift
