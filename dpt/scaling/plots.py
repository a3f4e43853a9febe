"""Figures as SVG or PNG: curves over steps or compute, and power laws in log-log with their equation."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpt.scaling.laws import Fit, Law

COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#c99a00", "#0b7285", "#c2255c", "#5c636a")

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpt",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#868e96",
    "axes.labelcolor": "#343a40",
    "xtick.color": "#495057",
    "ytick.color": "#495057",
    "axes.grid": True,
    "grid.color": "#e9ecef",
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}

Points = Sequence[tuple[float, float]]


def new_axes(x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False) -> Any:
    """An empty figure in the house's style: (figure, axes)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    return figure, axes


def plain(name: str) -> str:
    """A name as matplotlib shows it letter by letter: between dollars it would look for mathematics."""
    return name.replace("$", r"\$")


def _plain_ticks(axes: Any) -> None:
    """Numbers that people read, such as 1, 2, 5, 10, on logarithmic axes that span less than three decades of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if low >= 1e-4 and high <= 1e5 and high < 1e3 * low:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def curves(series: Mapping[str, Points], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False) -> Any:
    """Lines over a common axis: a thin line through the points as recorded, a strong one through their running mean."""
    figure, axes = new_axes(x_label, y_label, log_x=log_x, log_y=log_y)
    for number, (label, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        x, y = ([p[i] for p in thinned(points)] for i in (0, 1))
        marker = "o" if len(x) < 12 else None
        if len(x) >= 30:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
            y = running_mean(y)
        axes.plot(x, y, color=colour, linewidth=1.8, label=plain(label), marker=marker, markersize=4)
    if len(series) > 1:
        axes.legend(fontsize=9, frameon=False)
    return figure


def law_figure(
    groups: Mapping[str, Points],
    fits: Mapping[str, Fit],
    x_label: str,
    y_label: str,
    *,
    chosen: Points = (),
    join: bool = False,
    bars: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> Any:
    """Points in log-log, each group in its colour, and the fitted laws with their 95% bands and equations.

    `chosen` points (a frontier) are ringed; `join` connects the points of a group. `bars` are means of repeats by group, as
    (x, mean, half of its interval): then these are joined, and the single points are faint.
    """
    figure, axes = new_axes(x_label, y_label, log_x=True, log_y=True)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(groups)}
    for name, points in groups.items():
        x, y = ([p[i] for p in sorted(points)] for i in (0, 1))
        if bars and bars.get(name):
            middle, mean, half = zip(*sorted(bars[name]), strict=True)
            below = [min(h, 0.99 * m) for h, m in zip(half, mean, strict=True)]  # the axis is logarithmic
            drawn = {"yerr": (below, half), "capsize": 3} if all(map(math.isfinite, half)) else {}
            width = 1.4 if join else 0
            style = {"marker": "o", "markersize": 5, "linewidth": width, "elinewidth": 1, "label": plain(name) or None}
            axes.errorbar(middle, mean, color=colours[name], **style, **drawn)
            axes.scatter(x, y, color=colours[name], s=6, alpha=0.35)
            continue
        dense = len(x) > 40
        style = {"linewidth": 1.2 if join else 0, "markersize": 2 if dense else 5, "alpha": 0.6 if dense else 1.0}
        axes.plot(x, y, color=colours[name], marker="o", label=plain(name) or None, **style)
    if chosen:
        axes.scatter(*zip(*chosen, strict=True), s=70, facecolors="none", edgecolors="#343a40", linewidths=1)
    for name, fit in fits.items():
        colour = colours.get(name, "#343a40") if len(fits) > 1 else "#343a40"
        along = np.geomspace(fit.x.min() / 1.3, fit.x.max() * 1.3, 60)
        line, low, high = fit.predict(along)
        axes.fill_between(along, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(along, line, color=colour, linestyle="--", linewidth=1.4, label=_mathematical(fit.law))
    _plain_ticks(axes)
    if fits or any(groups):
        beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(groups) + len(fits) > 4 else {}
        axes.legend(fontsize=9, frameon=False, **beside)
    return figure


def _mathematical(law: Law) -> str:
    """The equation with the exponent raised."""
    return re.sub(r"\^(\S+)", r"$^{\1}$", law.equation())


def thinned(points: Points, most: int = 400) -> list[tuple[float, float]]:
    """At most `most` points: means of equal runs of neighbours."""
    stride = -(-len(points) // most) if points else 1
    if stride == 1:
        return list(points)
    groups = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def running_mean(values: Sequence[float], share: float = 0.03) -> list[float]:
    """The mean over a centred window of a share of the points (at least three of them)."""
    half = max(1, int(len(values) * share / 2))
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def to_svg(figure: Any) -> str:
    """The figure as an SVG document; the figure is closed."""
    from matplotlib import pyplot, rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()


def save(figure: Any, path: Path) -> Path:
    """Write the figure in the format of the file's suffix (svg, png, pdf); the figure is closed."""
    from matplotlib import pyplot, rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(_STYLE):
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
