"""Metrics of depth, optical flow and amodal segmentation for one image; protocols average them."""

import numpy as np


def depth_metrics(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Depth metrics over pixels `[n]`, both in metres and positive (Eigen et al. 2014).

    abs_rel: mean |p - g| / g; sq_rel: mean (p - g)^2 / g; rmse: metres; log10: mean |log10 p - log10 g|; si_log: 100 times the
    standard deviation of log p - log g (KITTI's); delta1-3: share of pixels with max(p / g, g / p) < 1.25, 1.25^2, 1.25^3.
    """
    p, g = prediction.astype(np.float64), truth.astype(np.float64)
    ratio = p / g
    error, relative, log_error = p - g, ratio - 1.0, np.log(ratio)
    factor = np.maximum(ratio, 1.0 / ratio)
    return {
        "abs_rel": float(np.abs(relative).mean()),
        "sq_rel": float(np.dot(error, relative) / p.size),
        "rmse": float(np.sqrt(np.dot(error, error) / p.size)),
        "log10": float(np.abs(log_error).mean() / np.log(10.0)),
        "si_log": float(100.0 * np.std(log_error)),
        **{f"delta{k}": float(np.mean(factor < 1.25**k)) for k in (1, 2, 3)},
    }


def flow_metrics(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Flow metrics over pixels `[2, n]`, both in pixels of the original image.

    epe: mean end-point error in pixels; outliers: share of pixels whose error is over 3 pixels and over 5% of the true motion
    (KITTI's Fl).
    """
    error = np.linalg.norm(prediction.astype(np.float64) - truth, axis=0)
    motion = np.linalg.norm(truth.astype(np.float64), axis=0)
    return {"epe": float(error.mean()), "outliers": float(np.mean((error > 3.0) & (error > 0.05 * motion)))}


def mask_metrics(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Mask metrics over pixels bool `[n]`: iou (1 if both are empty), and the pixel counts summed by a pooled IoU."""
    intersection, union = int(np.sum(prediction & truth)), int(np.sum(prediction | truth))
    return {"iou": intersection / union if union else 1.0, "intersection": float(intersection), "union": float(union)}
