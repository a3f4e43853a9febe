"""Evaluation protocols as data: what is valid, cropped, aligned, clipped and averaged for each data set.

Raise a protocol's version whenever a change here or in the metrics changes its figures: results carry it.
"""

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.ndimage import sobel

from dpt.errors import UserError
from dpt.evaluation.alignment import fit_affine, fit_affine_log
from dpt.evaluation.metrics import depth_metrics, flow_metrics, mask_metrics
from dpt.tasks import resize_nearest

# Fractions (top, bottom, left, right) of the image inside which pixels count.
_EIGEN_NYU = (45 / 480, 471 / 480, 41 / 640, 601 / 640)
_EIGEN_KITTI = (0.3324324, 0.91351351, 0.0359477, 0.96405229)  # Eigen et al. 2014, fractions of the 352 x 1216 crop


@dataclass(frozen=True, kw_only=True)
class LogFit:
    """Depth's second column: a robust fit in log depth (`fit_affine_log`), as in Marigold V2 (Pavlovic et al. 2026).

    It counts pixels in its own range, inside the protocol's region and crop, at the truth's own size or at `size`; fitted
    depth is clipped to between 1 mm and the greatest true depth among them.
    """

    valid_range: tuple[float, float] | None = None
    """Range of true depth in metres, exclusive, in which pixels count; None: the protocol's."""
    size: tuple[int, int] | None = None
    """Height and width that maps are resized to (nearest) before scoring; None: the truth's own."""
    steepest: float = math.inf
    """Limit on the summed magnitudes of the true depth's Sobel derivatives; pixels above it do not count."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Rules that turn the predictions for a data set into figures."""

    name: str
    task: str
    version: int = 1
    datasets: tuple[str, ...] = ()
    """Data sets it applies to, named as in manifests (compared without case, spaces and punctuation)."""
    num_samples: int = 0
    """Number of images in the published list; 0: not fixed."""
    valid_range: tuple[float, float] = (0.0, math.inf)
    """Depth: range of true depth in metres, exclusive, in which pixels count."""
    clip: tuple[float, float] = (1e-6, math.inf)
    """Depth: range in metres that aligned predictions are clipped to."""
    crop: tuple[float, float, float, float] | None = None
    """Fractions (top, bottom, left, right) inside which pixels count."""
    region: tuple[int, int] | None = None
    """Height and width in pixels of the bottom-centre part that counts and that `crop` is relative to; None: all."""
    align_longest: int = 0
    """Depth: longest side that maps are reduced to (nearest) to fit scale and shift; 0: full size."""
    log_fit: LogFit = LogFit()
    """Depth: rules of the second column."""
    main_metric: str = ""
    """The metric that ranks samples, and the first in tables."""
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None
    """Registered tasks: prediction and truth at the pixels that count, float32 `[C, N]` each -> the image's figures."""


HIGHER_IS_BETTER = {"delta1", "delta2", "delta3", "delta1_log_fit", "iou", "iou_pooled"}


def _depth(name: str, num_samples: int, metres: tuple[float, float], datasets: tuple[str, ...] = (), **more: Any) -> Protocol:
    """A depth protocol; predictions are clipped to the valid range, in metres, by default."""
    settings = {"valid_range": metres, "clip": metres, "datasets": datasets or (name,), "main_metric": "abs_rel"}
    return Protocol(name=name, task="depth", num_samples=num_samples, **(settings | more))


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        _depth("nyu_v2", 654, (1e-3, 10.0), ("nyu_v2", "nyu"), crop=_EIGEN_NYU, log_fit=LogFit(valid_range=(0.1, 10.0))),
        _depth("scannet", 800, (1e-3, 10.0), log_fit=LogFit(valid_range=(0.01, 10.0))),
        _depth(  # published with images of at most 756 pixels
            "eth3d", 454, (1e-5, math.inf), align_longest=1024, log_fit=LogFit(valid_range=(0.01, math.inf), size=(1360, 2048))
        ),
        # published with images of at most 640 pixels
        _depth("diode", 771, (0.0, math.inf), clip=(0.6, 350.0), log_fit=LogFit(valid_range=(0.6, 350.0), steepest=0.3)),
        _depth("hypersim", 7370, (1e-5, 65.0)),
        _depth(
            "kitti",
            652,
            (1e-5, 80.0),
            ("kitti", "kitti_eigen"),
            crop=_EIGEN_KITTI,
            region=(352, 1216),
            log_fit=LogFit(valid_range=(0.1, 80.0)),
        ),
        Protocol(name="flying_chairs", task="flow", datasets=("flying_chairs",), num_samples=640, main_metric="epe"),
        Protocol(name="pix2gestalt", task="amodal", datasets=("pix2gestalt",), main_metric="iou"),
        Protocol(name="coco_a", task="amodal", datasets=("coco_amodal", "cocoa"), main_metric="iou"),
        Protocol(name="mp3d_amodal", task="amodal", datasets=("mp3d_amodal", "mp3d"), main_metric="iou"),
        _depth("synthetic_depth", 0, (1e-3, math.inf)),
        Protocol(name="synthetic_flow", task="flow", main_metric="epe"),
        Protocol(name="synthetic_amodal", task="amodal", main_metric="iou"),
    )
}


def register_protocol(protocol: Protocol, *, higher_is_better: Collection[str] = ()) -> None:
    """Add a protocol; `higher_is_better`: its metrics for which higher is better. UserError if its name is taken."""
    if protocol.name in PROTOCOLS:
        raise UserError(f"protocol {protocol.name!r} already exists; choose another name.")
    PROTOCOLS[protocol.name] = protocol
    HIGHER_IS_BETTER.update(higher_is_better)


def find_protocol(dataset: str, task: str, *, name: str = "") -> Protocol:
    """Find the protocol called `name`, else the data set's, else, for synthetic sets, the task's own.

    UserError if there is none, or if it belongs to another task.
    """
    if name:
        if name not in PROTOCOLS:
            raise UserError(f"dpt.evaluation.protocol {name!r} is unknown; choose one of {', '.join(PROTOCOLS)}.")
        found: Protocol | None = PROTOCOLS[name]
    else:
        plain = _plain(dataset)
        candidates = [p for p in PROTOCOLS.values() if p.task == task and plain in map(_plain, p.datasets)]
        found = candidates[0] if candidates else PROTOCOLS.get(f"synthetic_{task}") if plain.startswith("synth") else None
    if found is None:
        raise UserError(
            f"data set {dataset!r} has no {task} protocol; set dpt.evaluation.protocol to one of {', '.join(PROTOCOLS)}."
        )
    if found.task != task:
        raise UserError(f"protocol {found.name!r} is for {found.task}, but the data is for {task}; choose another one.")
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def counted_pixels(protocol: Protocol, truth: np.ndarray) -> np.ndarray:
    """Mask bool `[H, W]` of pixels that count: valid truth inside the crop. truth: depth and masks `[H, W]`, others
    `[C, H, W]`."""
    height, width = truth.shape[-2:]
    if protocol.task == "depth":
        valid = np.isfinite(truth) & (truth > protocol.valid_range[0]) & (truth < protocol.valid_range[1])
    elif truth.ndim == 3:
        valid = np.isfinite(truth).all(axis=0)
    else:
        valid = np.ones((height, width), dtype=bool)
    return valid & _counted_area(protocol, height, width)


def _counted_area(protocol: Protocol, height: int, width: int) -> np.ndarray:
    """Mask bool `[H, W]` of pixels inside the protocol's region and crop."""
    rows, cols = protocol.region or (height, width)
    first_row, first_col = max(0, height - rows), max(0, (width - cols) // 2)
    rows, cols = min(rows, height), min(cols, width)
    fractions = protocol.crop or (0.0, 1.0, 0.0, 1.0)
    top, bottom, left, right = (int(f * side + 1e-6) for f, side in zip(fractions, (rows, rows, cols, cols), strict=True))
    inside = np.zeros((height, width), dtype=bool)
    inside[first_row + top : first_row + bottom, first_col + left : first_col + right] = True
    return inside


def align_depth_to_truth(protocol: Protocol, prediction: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Affine-invariant depth `[H, W]` -> metres: least-squares scale and shift on valid pixels, then the protocol's clip."""
    height, width = truth.shape
    maps: tuple[np.ndarray, ...] = (prediction, truth, valid)
    if 0 < protocol.align_longest < max(height, width):
        factor = protocol.align_longest / max(height, width)
        size = (round(height * factor), round(width * factor))
        reduced = tuple(resize_nearest(m, size) for m in maps)
        maps = reduced if reduced[2].any() else maps
    scale, shift = fit_affine(*maps)
    return np.clip(prediction * float(scale) + float(shift), max(1e-6, protocol.clip[0]), protocol.clip[1])


def score(protocol: Protocol, prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Score one image, prediction and truth at the truth's resolution; {} if no pixel counts.

    depth: prediction up to scale and shift, float `[H, W]`; adds "abs_rel_log_fit", "delta1_log_fit" after the fit of `LogFit`,
    if it has pixels. flow: pixels `[2, H, W]`; adds "epe_fit", "outliers_fit" after a scale and shift per axis, as in the
    authors' released code. amodal: bool `[H, W]`. Registered tasks: `[C, H, W]`. UserError if the prediction is not finite.
    """
    if prediction.shape != truth.shape:
        raise UserError(f"a prediction has shape {prediction.shape}, its truth {truth.shape}; resize it to the truth.")
    if not np.isfinite(prediction).all():
        raise UserError("a prediction has values that are not finite; fix the system that made it.")
    valid = counted_pixels(protocol, truth)
    if not valid.any():
        return {}
    if protocol.metrics is not None:
        return protocol.metrics(prediction[:, valid], truth[:, valid])
    if protocol.task == "depth":
        metres = align_depth_to_truth(protocol, prediction, truth, valid)
        return depth_metrics(metres[valid], truth[valid]) | _score_log_fit(protocol, prediction, truth)
    if protocol.task == "amodal":
        return mask_metrics(prediction[valid].astype(bool), truth[valid].astype(bool))
    scale, shift = fit_affine(prediction, truth, np.broadcast_to(valid, truth.shape))
    fitted = prediction * scale[:, None, None] + shift[:, None, None]
    with_fit = flow_metrics(fitted[:, valid], truth[:, valid])
    return flow_metrics(prediction[:, valid], truth[:, valid]) | {f"{name}_fit": value for name, value in with_fit.items()}


def _score_log_fit(protocol: Protocol, prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Score depth's second column; {} if it has no pixels."""
    rule = protocol.log_fit
    within = replace(protocol, valid_range=rule.valid_range or protocol.valid_range)
    valid = counted_pixels(within, truth)
    if rule.size is not None:
        prediction, truth, valid = (resize_nearest(m, rule.size) for m in (prediction, truth, valid))
    if math.isfinite(rule.steepest):
        known = np.where(np.isfinite(truth), truth, 0.0).astype(np.float32)
        valid &= np.abs(sobel(known, 0)) + np.abs(sobel(known, 1)) <= rule.steepest
    p, g = prediction[valid], truth[valid]
    if not g.size:
        return {}
    scale, shift = fit_affine_log(p, g)
    found = depth_metrics(np.clip(scale * p.astype(np.float64) + shift, 1e-3, float(g.max())), g)
    return {f"{name}_log_fit": found[name] for name in ("abs_rel", "delta1")}


def is_better(metric: str, value: float, other: float) -> bool:
    """Whether a metric's value is better than another."""
    return value > other if metric in HIGHER_IS_BETTER else value < other


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the images that have it; for masks also "iou_pooled", from summed intersections and unions."""
    scored = [row for row in rows if row]
    if not scored:
        return {}
    columns = {name: [row[name] for row in scored if name in row] for name in dict.fromkeys(n for row in scored for n in row)}
    result = {name: math.fsum(values) / len(values) for name, values in columns.items()}
    if "union" in result:
        union = math.fsum(row["union"] for row in scored)
        result["iou_pooled"] = math.fsum(row["intersection"] for row in scored) / union if union else 1.0
        del result["intersection"], result["union"]
    return result
