"""How metrics and other numbers are displayed. Imports nothing."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is shown: `value * scale` with `digits`, under `title`, which has the unit and an arrow to the better."""

    title: str
    scale: float
    digits: int
    lower_is_better: bool = True
    words: str = ""
    """The metric's meaning, in words."""

    @property
    def name(self) -> str:
        """The title without unit and arrow."""
        return self.title.rstrip(" ↓↑").replace(" %", "").replace(" px", "")

    @property
    def unit(self) -> str:
        """Unit of the displayed value: "%", "px" or ""."""
        return next((unit for unit in ("%", "px") if f" {unit}" in self.title), "")


_IOU = "mean overlap of predicted and true mask"
_REL = "mean relative error of depth"
_DELTA = "share of pixels whose depth is within a factor of 1.25"
_LOG = ", after a robust fit in log depth"

METRICS: dict[str, Metric] = {
    "abs_rel": Metric(title="AbsRel % ↓", scale=100, digits=2, words=_REL),
    "delta1": Metric(title="δ1 % ↑", scale=100, digits=1, lower_is_better=False, words=_DELTA),
    "abs_rel_log_fit": Metric(title="AbsRel %, log fit ↓", scale=100, digits=2, words=_REL + _LOG),
    "delta1_log_fit": Metric(title="δ1 %, log fit ↑", scale=100, digits=1, lower_is_better=False, words=_DELTA + _LOG),
    "epe": Metric(title="EPE px ↓", scale=1, digits=3, words="mean distance between predicted and true motion"),
    "epe_fit": Metric(title="EPE px, fitted ↓", scale=1, digits=3, words="the same after a scale and shift per axis"),
    "iou": Metric(title="mIoU % ↑", scale=100, digits=1, lower_is_better=False, words=_IOU),
    "iou_pooled": Metric(title="pooled IoU % ↑", scale=100, digits=1, lower_is_better=False, words="overlap of all pixels"),
    "fid": Metric(title="FID ↓", scale=1, digits=2, words="Fréchet distance to the reference images"),
    "sfid": Metric(title="sFID ↓", scale=1, digits=2, words="the same of spatial features"),
    "inception_score": Metric(title="IS ↑", scale=1, digits=1, lower_is_better=False, words="Inception Score"),
    "precision": Metric(title="precision ↑", scale=1, digits=3, lower_is_better=False, words="share of samples that look real"),
    "recall": Metric(title="recall ↑", scale=1, digits=3, lower_is_better=False, words="share of real images that are covered"),
    "fd_dinov2": Metric(title="FD-DINOv2 ↓", scale=1, digits=1, words="Fréchet distance of DINOv2 features"),
}
MAIN_METRIC = {"depth": "abs_rel", "flow": "epe", "amodal": "iou", "class": "fid"}

BASELINES = {"depth": "best constant", "flow": "no motion", "amodal": "visible mask"}
"""Baseline that a task's predictions must beat: the best without seeing the image; for amodal, its input mask."""
CEILING = "truth through the VAE"
CODE = "truth through the image code"
EXPLANATIONS = {
    "best constant": "the best prediction of one depth for the whole image, aligned and scored like the others",
    "no motion": "flow of zero everywhere",
    "visible mask": "the mask of the visible part, taken as if it were the whole object",
    CEILING: "the true target encoded and decoded again: what the image code, the resolution and the VAE leave of it",
    CODE: "the true picture of the whole object thresholded into a mask, without the VAE",
}


def show(metric: str, value: float | None) -> str:
    """A metric's value as shown in tables, without its unit; "–" for none."""
    shown = METRICS[metric]
    return "–" if value is None else f"{value * shown.scale:.{shown.digits}f}"


def name_of(metric: str) -> str:
    """A metric's display name; metrics that tables do not show keep their own names."""
    return METRICS[metric].name if metric in METRICS else metric


def say(metric: str, value: float) -> str:
    """A metric and its value in words, such as "AbsRel 5.90 %"; metrics that tables do not show are not converted."""
    return f"{name_of(metric)} {with_unit(metric, value)}"


def with_unit(metric: str, value: float) -> str:
    """A metric's value with its unit, such as "5.90 %"; `metric` may be a path that ends in its name."""
    metric = metric.rpartition("/")[2]
    return f"{show(metric, value)} {METRICS[metric].unit}".rstrip() if metric in METRICS else f"{value:.4g}"


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between `low` and `high`, at most `most`."""
    span = max(high - low, 1e-9)
    step = 10.0 ** math.floor(math.log10(span / most))
    step = next(s for s in (step, 2 * step, 5 * step, 10 * step, 20 * step) if span / s <= most - 0.999)
    first = math.ceil(low / step - 1e-6)
    return [k * step for k in range(first, math.floor(high / step + 1e-6) + 1)]


def readable(value: float) -> str:
    """A number with at most three significant digits, without an exponent unless it is very small or large."""
    return f"{float(f'{value:.3g}'):.15g}"
