"""Runs that differ only in one tag, such as the seed, as one point: their mean and its interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dpt.errors import UserError
from dpt.scaling.points import Point
from dpt.tracking.read import RunRecord

_STUDY = "study."


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean of repeats at one x, with the 95% interval of Student's t."""

    x: float
    y: float
    half_width: float
    """Half-width of the interval; infinite for a single run."""
    group: str
    runs: list[RunRecord]


def means(points: Sequence[Point], over: str) -> list[Mean]:
    """One mean for all points of equal x whose runs differ in no tag of their study but `over`, in the points' order.

    Raises:
        UserError: a run does not have the tag.
    """
    by_rest: dict[tuple[object, ...], list[Point]] = {}
    for point in points:
        tags = {name: value for name, value in point.run.tags.items() if name.startswith(_STUDY)}
        if tags.pop(over, None) is None:
            raise UserError(
                f'{point.run.name} has no tag "{over}", over which the mean is to be taken; known: {_known(point)}.'
            )
        by_rest.setdefault((point.group, f"{point.x:.6g}", *sorted(tags.items())), []).append(point)
    return [
        Mean(
            x=members[0].x,
            y=statistics.fmean(p.y for p in members),
            half_width=half_width([p.y for p in members]),
            group=members[0].group,
            runs=[p.run for p in members],
        )
        for members in by_rest.values()
    ]


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean by Student's t; infinite for one value."""
    from scipy.stats import t

    if len(values) < 2:
        return math.inf
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def as_markdown(found: Sequence[Mean], x_label: str, y_label: str, *, scale: float = 1.0, digits: int = 3) -> str:
    """A table with a row for each group and a column for each x; cells are "mean ± half of the interval", times `scale`."""
    columns = sorted({mean.x for mean in found})
    cells = {(mean.group, mean.x): mean for mean in found}
    lines = [f"| {y_label}; {x_label} | " + " | ".join(f"{x:.4g}" for x in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for group in dict.fromkeys(mean.group for mean in found):
        row = [_cell(cells.get((group, x)), scale, digits) for x in columns]
        lines.append(f"| {group} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _cell(mean: Mean | None, scale: float, digits: int) -> str:
    if mean is None:
        return "–"
    text = f"{mean.y * scale:.{digits}f}"
    return text if math.isinf(mean.half_width) else f"{text} ± {mean.half_width * scale:.{digits}f}"


def _known(point: Point) -> str:
    return ", ".join(name for name in sorted(point.run.tags) if name.startswith(_STUDY)) or "none of a study"
