"""Scale and shift fits that align affine-invariant predictions to the truth before they are scored."""

import numpy as np


def fit_affine(prediction: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and shift, float64 `[...]`, that minimise the sum of (scale prediction + shift - truth)^2 over valid pixels.

    prediction, truth: float `[..., H, W]`; valid: bool of the same shape, at least one pixel true in each map. Computed in
    double precision on centred values. A constant prediction gets scale 0 and the truth's mean as shift.
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


MOST_TRIALS = 1000
"""Most pixel pairs that a robust fit tries; it stops early once the chance of a better one is at most 1%."""
_TRIAL_PIXELS = 1 << 16
"""Pixels that trials are judged on; the final fit uses all of them."""


def fit_affine_log(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Fit scale and shift to depth pixels `[n]` robustly, with the error measured in log depth; truth is positive.

    RANSAC (Fischler and Bolles 1981) as in the protocol of Pixel-Perfect Depth (Xu et al. 2025) and Marigold V2: a pixel is an
    inlier if |log(scale prediction + shift) - log truth| is below the median absolute deviation of log truth; of the
    pairs of pixels drawn, the one with the most inliers wins, and the sum of squared errors of its inliers is minimised.
    Their networks predict log depth up to scale and shift, so they fit a line; ours predict depth up to scale and shift,
    so both are fitted through the logarithm (Gauss-Newton). The draws are the same every time. If no pair gives a
    positive scale: scale 0, and the median of log truth.
    """
    p, g = prediction.astype(np.float64), truth.astype(np.float64)
    log_truth = np.log(g)
    middle = float(np.median(log_truth))
    tolerance = float(np.median(np.abs(log_truth - middle)))
    random = np.random.default_rng(0)
    some = random.choice(p.size, _TRIAL_PIXELS, replace=False) if p.size > _TRIAL_PIXELS else np.arange(p.size)
    best = _best_trial(p[some], g[some], tolerance, random)
    if best is None:
        return 0.0, float(np.exp(middle))
    inside = _inliers(p, g, *best, tolerance)
    return _refine_log(p[inside], log_truth[inside], *best)


def _inliers(p: np.ndarray, g: np.ndarray, scale: float, shift: float, tolerance: float) -> np.ndarray:
    """Mask of pixels where log(scale p + shift) is within `tolerance` of log g; False where scale p + shift is not positive."""
    ratio = (scale * p + shift) / g
    return np.asarray((ratio >= np.exp(-tolerance)) & (ratio <= np.exp(tolerance)))


def _best_trial(p: np.ndarray, g: np.ndarray, tolerance: float, random: np.random.Generator) -> tuple[float, float] | None:
    """The line through two pixels with the most inliers, the first among equals; None if no line rises."""
    best, most, needed = None, 0, float(MOST_TRIALS)
    pairs = random.integers(0, p.size, (MOST_TRIALS, 2))
    for trial, (i, j) in enumerate(pairs.tolist()):
        if trial >= needed:
            break
        if (p[i] - p[j]) * (g[i] - g[j]) <= 0:
            continue
        scale = float((g[i] - g[j]) / (p[i] - p[j]))
        line = scale, float(g[i] - scale * p[i])
        count = int(_inliers(p, g, *line, tolerance).sum())
        if count > most:
            best, most = line, count
            share = min((count / p.size) ** 2, 1.0 - 1e-12)
            needed = np.log(0.01) / np.log1p(-share)
    return best


def _refine_log(p: np.ndarray, log_truth: np.ndarray, scale: float, shift: float) -> tuple[float, float]:
    """Refine scale and shift to minimise the sum of (log(scale p + shift) - log_truth)^2; scale stays positive."""
    mean = p.mean()
    p = p - mean  # makes shift and scale nearly independent
    fit = np.array([scale, shift + scale * mean])

    def residual(values: np.ndarray) -> np.ndarray | None:
        depth = values[0] * p + values[1]
        return np.log(depth) - log_truth if values[0] > 0 and depth.min() > 0 else None

    error = residual(fit)
    assert error is not None, "inliers have positive depth"
    squares = float(np.sum(error * error))
    for _ in range(20):
        inverse = 1.0 / (fit[0] * p + fit[1])
        slope = p * inverse
        move = _solve_normal(slope, inverse, -error)
        for halving in range(20):
            tried = residual(fit + move / 2**halving)
            if tried is not None and np.sum(tried * tried) <= squares:
                break
        else:
            break
        before, squares = squares, float(np.sum(tried * tried))
        fit, error = fit + move / 2**halving, tried
        if before - squares <= 1e-12 * squares:
            break
    return float(fit[0]), float(fit[1] - fit[0] * mean)


def _solve_normal(first: np.ndarray, second: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least-squares factors `[2]` of two columns `[n]` for the target; uses sums because threaded products are slower."""
    a, b, c = (float(np.sum(x * y)) for x, y in ((first, first), (first, second), (second, second)))
    normal = np.array([[a, b], [b, c]])
    return np.asarray(np.linalg.lstsq(normal, [np.sum(first * target), np.sum(second * target)], rcond=None)[0])
