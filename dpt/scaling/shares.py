"""At which share of one way's compute another reaches its quality: of the training's MACs, and of a prediction's."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dpt.errors import UserError
from dpt.scaling.compute import total_train_macs
from dpt.scaling.points import text_value
from dpt.scaling.repeats import half_width
from dpt.scaling.results import evaluation_rows
from dpt.scores import METRICS
from dpt.tracking.read import RunRecord, ancestors


@dataclass(frozen=True, kw_only=True)
class Share:
    """One setting of the reference, and what the others need to be as good; shares are means over those repeats that are."""

    group: str
    steps: int | None
    ensemble: int | None
    y: float
    """The reference's metric, the mean over its repeats."""
    train_share: float
    """MACs of all training, ancestors included, over the reference's; NaN if no repeat becomes as good."""
    train_half_width: float
    at_most: bool
    """Some repeat is as good with its least training already, so that the share is smaller than this."""
    test_share: float
    """MACs of one prediction over the reference's, at the cheapest setting that is as good."""
    reached: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class _Scored:
    group: str
    stage: str
    repeat: str
    steps: int | None
    ensemble: int | None
    train_macs: float
    test_macs: float
    y: float


def shares(
    records: Sequence[RunRecord], family: Sequence[RunRecord], *, y: str, reference: str, group_by: str, over: str
) -> list[Share]:
    """For each group and each setting (sampler steps, members) of the stage `reference`, what all other stages need.

    y: a metric "eval/TASK/[SET/]NAME"; whether more or less of it is better, `dpt.scores.METRICS` knows. Between two
    trainings of the others the metric is taken as linear in the logarithm of MACs.

    Raises:
        UserError: the metric is no evaluation's, or a group lacks the reference or the others.
    """
    if not y.startswith("eval/") or y.rpartition("/")[2] not in METRICS:
        raise UserError(f'"{y}": shares of compute need a metric of evaluations, such as eval/depth/abs_rel.')
    scored = list(_scored(records, family, y, group_by, over))
    found = []
    for group in dict.fromkeys(one.group for one in scored):
        inside = [one for one in scored if one.group == group]
        references = [one for one in inside if one.stage == reference]
        others = [one for one in inside if one.stage != reference]
        if not references or not others:
            raise UserError(f'{group or "these runs"}: shares need evaluations of the stage "{reference}" and of another.')
        for setting in sorted({(one.steps or 0, one.ensemble or 0) for one in references}):
            same = [one for one in references if (one.steps or 0, one.ensemble or 0) == setting]
            found.append(_share(group, same, others))
    return found


def _scored(records: Sequence[RunRecord], family: Sequence[RunRecord], y: str, group_by: str, over: str) -> Iterable[_Scored]:
    _, task, *dataset, metric = y.split("/")
    sign = 1.0 if METRICS[metric].lower_is_better else -1.0
    for record in records:
        trained = next(iter(ancestors(record, family)), None)
        macs = total_train_macs(trained, family) if trained else 0.0
        for row in evaluation_rows(record):
            if row.run is None or row.task != task or metric not in row.metrics or not macs or not row.macs:
                continue
            if dataset and row.dataset != "/".join(dataset):
                continue
            yield _Scored(
                group=text_value(record, family, group_by),
                stage=record.tags.get("study.stage", ""),
                repeat=record.tags.get(over, ""),
                steps=row.steps,
                ensemble=row.ensemble,
                train_macs=macs,
                test_macs=row.macs,
                y=sign * row.metrics[metric],
            )


def _share(group: str, references: Sequence[_Scored], others: Sequence[_Scored]) -> Share:
    target = statistics.fmean(one.y for one in references)
    train_macs = statistics.fmean(one.train_macs for one in references)
    repeats = dict.fromkeys(one.repeat for one in others)
    needed, least = list[float](), False
    for repeat in repeats:
        best: dict[float, float] = {}
        for one in others:
            if one.repeat == repeat:
                best[one.train_macs] = min(one.y, best.get(one.train_macs, math.inf))
        x = _first_at(sorted(best.items()), target)
        if x is not None:
            needed.append(x / train_macs)
            least = least or x == min(best)
    good = [one.test_macs for one in others if one.y <= target]
    return Share(
        group=group,
        steps=references[0].steps,
        ensemble=references[0].ensemble,
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
