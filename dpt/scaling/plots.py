"""Figures as SVG or PNG: curves over steps or compute, and power laws in log-log with their equation."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpt.errors import UserError
from dpt.scaling.laws import Fit, Law

COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#c99a00", "#0b7285", "#c2255c", "#5c636a")
WORDS = {
    "train/loss": "training loss",
    "train/load_balancing_loss": "load balancing loss",
    "train/grad_norm": "gradient norm",
    "perf/samples_per_second": "samples per second",
    "experts/distance": "distance of experts / their norm",
}
"""Axis labels of recorded metrics."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
LINES = ("-", "--", ":", "-.")
SUFFIXES = (".svg", ".png", ".pdf")
"""Suffixes of figure files."""

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


def new_axes(x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False, legend: bool = False) -> Any:
    """An empty figure in the house's style: (figure, axes); with `legend` it is wider, for a legend beside the axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(8.0, 3.8) if legend else (6.4, 3.8))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    return figure, axes


def plain(name: str) -> str:
    """A name escaped for matplotlib, which would parse text between dollars as mathematics."""
    return name.replace("$", r"\$")


def style_of(number: int) -> dict[str, str]:
    """Colour, marker and line of the `number`-th series: no two of the first 32 look alike."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
    }


def short_number(value: float) -> str:
    """A number in human-readable form: 0.05, 200, 20k, 1.5M, 2G, 30T, 1P."""
    for factor, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor * (1 - 1e-9):
            return f"{value / (1e3 if suffix == 'k' else factor):g}{suffix}"
    return f"{value:g}"


def _plain_ticks(axes: Any) -> None:
    """Label both axes with human-readable numbers, such as 1, 2, 5, 10, 20k or 1T."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if axis.get_scale() == "log":
            if low < 1e-4:
                continue  # powers of ten read better there
            if high < 1e3 * low:
                steps = (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
                axis.set_major_locator(LogLocator(subs=steps if high > 1.6 * low else tuple(1 + i / 10 for i in range(90))))
            axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(float(f"{value:.6g}"))))


def _legend_beside(axes: Any) -> None:
    """Put the legend to the right of the axes, where it covers nothing."""
    count = len(axes.get_legend_handles_labels()[1])
    axes.legend(
        fontsize=9 if count <= 16 else 6.5,
        ncols=-(-count // 26),
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
    )


def curves(series: Mapping[str, Points], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False) -> Any:
    """Lines over a common axis: a thin line through the points as recorded, a strong one through their running mean."""
    figure, axes = new_axes(x_label, y_label, log_x=log_x, log_y=log_y, legend=len(series) > 1)
    for number, (label, points) in enumerate(series.items()):
        style = style_of(number)
        x, y = ([p[i] for p in thinned(points)] for i in (0, 1))
        if len(x) >= 30:
            axes.plot(x, y, color=style["color"], linewidth=0.8, alpha=0.3)
            y = running_mean(y)
        axes.plot(x, y, linewidth=1.8, label=plain(label), markersize=4.5, markevery=max(1, len(x) // 8), **style)
    _plain_ticks(axes)
    if len(series) > 1:
        _legend_beside(axes)
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
    (x, mean, half of its interval): if given, these are joined, and the single points are faint.
    """
    figure, axes = new_axes(x_label, y_label, log_x=True, log_y=True, legend=True)
    styles = {name: style_of(i) for i, name in enumerate(groups)}
    colours = {name: style["color"] for name, style in styles.items()}
    for name, points in groups.items():
        x, y = ([p[i] for p in sorted(points)] for i in (0, 1))
        if bars and bars.get(name):
            middle, mean, half = zip(*sorted(bars[name]), strict=True)
            below = [min(h, 0.99 * m) for h, m in zip(half, mean, strict=True)]  # the axis is logarithmic
            drawn = {"yerr": (below, half), "capsize": 3} if all(map(math.isfinite, half)) else {}
            how: dict[str, Any] = {
                "markersize": 5,
                "linewidth": 1.4 if join else 0,
                "elinewidth": 1,
                "label": plain(name) or None,
            }
            axes.errorbar(middle, mean, **styles[name], **how, **drawn)
            axes.scatter(x, y, color=colours[name], s=6, alpha=0.35)
            continue
        dense = len(x) > 40
        how = {"linewidth": 1.2 if join else 0, "markersize": 2 if dense else 5, "alpha": 0.6 if dense else 1.0}
        axes.plot(x, y, label=plain(name) or None, **styles[name], **how)
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
        _legend_beside(axes)
    return figure


def _mathematical(law: Law) -> str:
    """The equation with the exponent as a superscript."""
    return re.sub(r"\^(\S+)", r"$^{\1}$", law.equation())


def thinned(points: Points, most: int = 400) -> list[tuple[float, float]]:
    """Thin to at most `most` points: means of equal runs of neighbours."""
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
    """Write the figure in the format of the file's suffix (svg, png, pdf); the figure is closed. UserError for any other."""
    from matplotlib import pyplot, rc_context

    if path.suffix.lower() not in SUFFIXES:
        pyplot.close(figure)
        raise UserError(f"{path}: a figure can be written as {', '.join(SUFFIXES)}; give its file one of these suffixes.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(_STYLE):
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
