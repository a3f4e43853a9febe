"""The share of one method's compute at which another reaches its quality, in MACs of training and of a prediction."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpt.errors import UserError
from dpt.scaling.points import FigureSpec, Point, evaluation_points
from dpt.scaling.repeats import half_width
from dpt.scores import METRICS
from dpt.tracking.read import RunRecord


@dataclass(frozen=True, kw_only=True)
class Share:
    """One setting of the reference, and what the others need to match it; shares are means over the repeats that do."""

    group: str
    steps: int | None
    ensemble: int | None
    y: float
    """The reference's metric, the mean over its repeats."""
    train_share: float
    """MACs of all training, ancestors included, over the reference's; NaN if no repeat matches it."""
    train_half_width: float
    at_most: bool
    """Whether some repeat matches it with its least training already, so that the share is smaller than this."""
    test_share: float
    """MACs of one prediction over the reference's, at the cheapest setting that matches it."""
    reached: int
    repeats: int


def shares(records: Sequence[RunRecord], family: Sequence[RunRecord], spec: FigureSpec) -> list[Share]:
    """Shares that all other stages need to match each setting (steps, members) of the stage `spec.reference`, by group.

    `dpt.scores.METRICS` says whether more or less of the metric is better. Between two trainings of the others it is taken to
    be linear in the logarithm of MACs.

    Raises:
        UserError: the metric is not an evaluation's, or a group lacks the reference or the others.
    """
    metric = METRICS.get(spec.y.rpartition("/")[2])
    if not spec.y.startswith("eval/") or metric is None:
        raise UserError(f'"{spec.y}": shares of compute need a metric of evaluations, such as eval/depth/abs_rel.')
    every_setting = replace(spec, x="total_macs", predictions=0, steps=None, ensemble=None)  # over MACs of training alone
    sign = 1.0 if metric.lower_is_better else -1.0
    scored = [replace(point, y=sign * point.y) for point in evaluation_points(records, family, every_setting)]
    found = []
    for group in dict.fromkeys(one.group for one in scored):
        inside = [one for one in scored if one.group == group]
        references = [one for one in inside if _stage(one) == spec.reference]
        others = [one for one in inside if _stage(one) != spec.reference]
        if not references or not others:
            raise UserError(f'{group or "these runs"}: shares need evaluations of the stage "{spec.reference}" and of another.')
        for setting in sorted({one.setting for one in references}, key=lambda pair: (pair[0] or 0, pair[1] or 0)):
            found.append(_share([one for one in references if one.setting == setting], others, spec.over))
    return found


def _stage(point: Point) -> str:
    return point.run.tags.get("study.stage", "")


def _share(references: Sequence[Point], others: Sequence[Point], over: str) -> Share:
    target = statistics.fmean(one.y for one in references)
    train_macs = statistics.fmean(one.x for one in references)
    repeats = dict.fromkeys(one.run.tags.get(over, "") for one in others)
    needed, least = list[float](), False
    for repeat in repeats:
        best: dict[float, float] = {}
        for one in others:
            if one.run.tags.get(over, "") == repeat:
                best[one.x] = min(one.y, best.get(one.x, math.inf))
        x = _first_at(sorted(best.items()), target)
        if x is not None:
            needed.append(x / train_macs)
            least = least or x == min(best)
    good = [one.test_macs for one in others if one.y <= target]
    return Share(
        group=references[0].group,
        steps=references[0].setting[0],
        ensemble=references[0].setting[1],
        y=abs(target),
        train_share=statistics.fmean(needed) if needed else math.nan,
        train_half_width=half_width(needed),
        at_most=least,
        test_share=min(good) / references[0].test_macs if good else math.nan,
        reached=len(needed),
        repeats=len(repeats),
    )


def _first_at(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The least x at which a line through points of rising x, straight between them over log x, falls to the target."""
    for number, (x, y) in enumerate(points):
        if y > target:
            continue
        if number == 0 or y == target:
            return x
        x0, y0 = points[number - 1]
        return float(x0 * (x / x0) ** ((y0 - target) / (y0 - y)))
    return None


def as_markdown(found: Sequence[Share], reference: str, y: str) -> str:
    """A row for each setting of the reference."""
    shown = METRICS[y.rpartition("/")[2]]
    lines = [
        f"| {reference}: steps, members | {shown.title} | share of its training MACs | of a prediction's |",
        "|---|---|---|---|",
    ]
    for one in found:
        name = f"{one.group} {one.steps}, {one.ensemble}".strip()
        if not one.reached:
            lines.append(f"| {name} | {one.y * shown.scale:.{shown.digits}f} | not reached | – |")
            continue
        width = "" if one.at_most or math.isinf(one.train_half_width) else f" ± {one.train_half_width:.3f}"
        part = "" if one.reached == one.repeats else f" ({one.reached} of {one.repeats})"
        share = f"{'at most ' if one.at_most else ''}{one.train_share:.3f}{width}{part}"
        lines.append(f"| {name} | {one.y * shown.scale:.{shown.digits}f} | {share} | {one.test_share:.3g} |")
    return "\n".join(lines) + "\n"
