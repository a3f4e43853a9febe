"""Points (x, y) from runs, for laws to fit and figures to show."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from dpt.errors import UserError
from dpt.models.costs import num_params
from dpt.scaling.compute import model_config, total_train_macs, train_macs
from dpt.scaling.results import Row, evaluation_rows
from dpt.tracking.read import RunRecord, ancestors

TEST_TIME = ("test_macs", "total_macs", "steps", "ensemble")
X_NAMES = {
    "macs": "MACs of the whole training, ancestors included",
    "own_macs": "MACs of the last training alone",
    "test_macs": "MACs of one prediction",
    "total_macs": "MACs of the whole training and of the predictions",
    "steps": "sampler steps",
    "ensemble": "ensemble size",
    "params": "parameters that one token passes through",
    "params_total": "all parameters",
    "samples": "samples seen by the last training",
}
"""Names that `x` may take, besides a metric or a numeric recipe field."""
_SETTING = re.compile(r"/s\d+_n\d+$")
_BEGINNING = 0.1
_STRETCH, _STRETCH_VALUES = 1.1, 5
_HISTORIES = {"macs": "compute/train_macs", "own_macs": "compute/train_macs", "samples": "train/samples_seen"}


@dataclass(frozen=True, kw_only=True)
class FigureSpec:
    """Specification of a figure."""

    name: str = "figure"
    """Name of its file."""
    title: str = ""
    """Description of the figure, in words."""
    x: str = "macs"
    """One of `X_NAMES`; or a metric, or a numeric field of the recipe."""
    y: str = "eval/depth/abs_rel"
    """A metric; "1-METRIC" for one minus it."""
    group_by: str = ""
    """A recipe field, tag, "label", "name" or "stage" (or several, separated by commas); one law per value."""
    steps: int | None = None
    """Only evaluations with this many sampler steps."""
    ensemble: int | None = None
    """Only evaluations with this ensemble size."""
    predictions: int = 0
    """Predictions whose compute is added to that of training, for x "total_macs"."""
    curve: bool = False
    """All recorded values of a training metric, not just the last; laws and frontiers leave out the beginning of training."""
    frontier: bool = False
    """One law through the least y that each x can buy."""
    offset: bool = False
    """Fit y = a x^b + c."""
    law: bool = True
    """Whether to fit laws."""
    over: str = ""
    """A tag, such as "study.seed": runs that differ only in it are drawn as their mean with its 95% interval, and tabulated."""
    reference: str = ""
    """A stage of a study: tabulates the share of its compute at which the others match it, by group and repeat (`over`)."""
    stages: list[str] = field(default_factory=list)
    """Stages of a study whose runs it shows; empty: all that have its x and y."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point and its run."""

    x: float
    y: float
    group: str
    run: RunRecord
    setting: tuple[int | None, int | None] = (None, None)
    """Sampler steps and ensemble size of an evaluation."""
    test_macs: float = 0.0
    """MACs of one prediction of an evaluation; 0: not recorded."""


def collect(records: Sequence[RunRecord], family: Sequence[RunRecord], spec: FigureSpec) -> list[Point]:
    """The points of a figure from `records`; `family` holds them and their ancestors.

    A metric "eval/TASK/[SET/]NAME" gives the points of `evaluation_points`. Other metrics give each training's last value, or
    with `curve` its whole history as means over stretches (`stretches`), for laws and frontiers without the beginning
    (`settled`). Raises UserError if nothing fits.
    """
    name = spec.y.removeprefix("1-")
    if name.startswith("eval/") and name.count("/") < 2:
        raise UserError(
            f'y "{spec.y}": a metric of evaluations is eval/TASK/METRIC or eval/TASK/SET/METRIC; {_known(records, name)}.'
        )
    points = (evaluation_points if name.startswith("eval/") else _training_points)(records, family, spec)
    if not points and name not in _recorded(records):
        raise UserError(f'y "{spec.y}": none of the {len(records)} runs has recorded it; {_known(records, name)}.')
    if not points:
        known = ", ".join(X_NAMES)
        raise UserError(
            f'x "{spec.x}": no run that has the y "{spec.y}" has it; x may be {known}, a metric, or a numeric field.'
        )
    return points if name == spec.y else [replace(p, y=1 - p.y) for p in points]


def _recorded(records: Sequence[RunRecord]) -> list[str]:
    return sorted({_SETTING.sub("", metric) for record in records for metric in record.metrics})


def _known(records: Sequence[RunRecord], name: str) -> str:
    """Names that y may take: the closest that the runs have recorded, or those of evaluations first."""
    recorded = _recorded(records)
    if not recorded:
        return "they have recorded nothing yet"
    close = get_close_matches(name, recorded, n=3, cutoff=0.5)
    if close:
        return f"the nearest are {', '.join(close)}"
    shown = sorted(recorded, key=lambda m: (not m.startswith("eval/"), m))[:12]
    more = f" and {len(recorded) - len(shown)} more" if len(recorded) > len(shown) else ""
    return f"they have {', '.join(shown)}{more}"


def evaluation_points(records: Sequence[RunRecord], family: Sequence[RunRecord], spec: FigureSpec) -> list[Point]:
    """A point for each evaluation, or for each of its settings if `x` is a test-time quantity.

    Of the settings with the spec's `steps` and `ensemble`, an evaluation's point is the main one, else the largest. Raises
    UserError if an evaluation has several sets and y names none.
    """
    name = spec.y.removeprefix("1-")
    _, task, *dataset, metric = name.split("/")
    points = []
    for record in records:
        rows = [r for r in evaluation_rows(record) if r.run is not None and r.task == task and metric in r.metrics]
        rows = [r for r in rows if not dataset or r.dataset == "/".join(dataset)]
        if len(sets := {r.dataset for r in rows}) > 1:
            names = " or ".join(f"eval/{task}/{one}/{metric}" for one in sorted(sets))
            raise UserError(f"{record.name}: {name} is of several sets in this evaluation; choose {names}.")
        rows = [r for r in rows if spec.steps in (None, r.steps) and spec.ensemble in (None, r.ensemble)]
        if spec.x not in TEST_TIME and len(rows) > 1:
            rows = [r for r in rows if r.metrics[metric] == record.metrics.get(name)][:1] or rows[-1:]
        group = text_value(record, family, spec.group_by)
        for row in rows:
            x, setting = _row_x(record, row, family, spec), (row.steps, row.ensemble)
            if x is not None:
                y = row.metrics[metric]
                points.append(Point(x=x, y=y, group=group, run=record, setting=setting, test_macs=row.macs or 0.0))
    return points


def _row_x(record: RunRecord, row: Row, family: Sequence[RunRecord], spec: FigureSpec) -> float | None:
    if spec.x == "total_macs":
        training = run_value(record, family, "macs")
        return None if training is None or row.macs is None else training + spec.predictions * row.macs
    if spec.x not in TEST_TIME:
        return run_value(record, family, spec.x)
    value = {"test_macs": row.macs, "steps": row.steps, "ensemble": row.ensemble}[spec.x]
    return None if value is None else float(value)


def _training_points(records: Sequence[RunRecord], family: Sequence[RunRecord], spec: FigureSpec) -> list[Point]:
    name = spec.y.removeprefix("1-")
    points = []
    for record in records:
        if name not in record.metrics:
            continue
        group = text_value(record, family, spec.group_by)
        history = record.history(name)
        if spec.curve:
            kept = settled(record, history) if spec.law or spec.frontier else history
            pairs = stretches(along(record, family, spec.x, kept))
        else:
            value = run_value(record, family, spec.x)
            pairs = [] if value is None else [(value, final_value(history))]
        points += [Point(x=a, y=b, group=group, run=record) for a, b in pairs]
    return points


def along(
    record: RunRecord, family: Sequence[RunRecord], x: str, history: Sequence[tuple[int, float]]
) -> list[tuple[float, float]]:
    """A metric's history over steps, samples or MACs ("macs": with those of the ancestors), from the first step on."""
    if x == "steps":
        return [(float(step), value) for step, value in history if step > 0]
    if x not in _HISTORIES:
        raise UserError(f'x "{x}": a curve runs over steps, {" or ".join(_HISTORIES)}.')
    at = dict(record.history(_HISTORIES[x]))
    before = total_train_macs(record, family) - train_macs(record) if x == "macs" else 0.0
    return [(before + at[step], value) for step, value in history if at.get(step, 0) > 0]


def settled(record: RunRecord, history: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A history without the training's first tenth and its warm-up, where the loss falls from its start whatever is trained.

    There the frontier would be the smallest network's alone, though a still smaller one could do the same for less.
    """
    warmup = int(record.params.get("training.warmup_steps", 0))
    first = max(_BEGINNING * history[-1][0], min(warmup, history[-1][0] - 1)) if history else 0
    return [(step, value) for step, value in history if step > first]


def stretches(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A noisy curve in fewer points: (geometric mean of x, mean of y) over stretches that do not overlap.

    A stretch spans 10% of x and holds at least 5 values (a tenth of a curve of fewer than 50; a curve of fewer than 20 is left
    as it is). The least values of a raw curve, which a frontier looks for, would be the luckiest ones, and early on the rarest.
    """
    pairs = sorted(pairs)
    least = min(_STRETCH_VALUES, len(pairs) // 10)
    if least < 2:
        return pairs
    groups = [[pairs[0]]]
    for pair in pairs[1:]:
        if len(groups[-1]) >= least and pair[0] >= _STRETCH * groups[-1][0][0]:
            groups.append([])
        groups[-1].append(pair)
    if len(groups) > 1 and len(groups[-1]) < least:
        last = groups.pop()
        groups[-1] += last
    return [(math.exp(sum(math.log(x) for x, _ in g) / len(g)), sum(y for _, y in g) / len(g)) for g in groups]


def final_value(history: Sequence[tuple[int, float]]) -> float:
    """The mean of the last twentieth of a history: a noisy curve's level at its end."""
    last = [value for _, value in history[-max(1, len(history) // 20) :]]
    return sum(last) / len(last)


def run_value(record: RunRecord, family: Sequence[RunRecord], x: str) -> float | None:
    """A number of a run, or of its nearest ancestor that has it; None if none does."""
    trained = record if record.stage != "evaluate" else next(iter(ancestors(record, family)), None)
    if x == "macs":
        return (total_train_macs(trained, family) if trained else 0.0) or None
    if x == "own_macs":
        return (train_macs(trained) if trained else 0.0) or None
    if x in ("params", "params_total"):
        config = model_config(trained) if trained else None
        return None if config is None else float(num_params(config).active if x == "params" else num_params(config).total)
    name = "train/samples_seen" if x == "samples" else x
    for run in [record, *ancestors(record, family)]:
        if name in run.metrics:
            return run.metrics[name]
        try:
            return float(run.params[name])
        except (KeyError, ValueError):
            continue
    return None


def text_value(record: RunRecord, family: Sequence[RunRecord], name: str) -> str:
    """A recipe field or tag of a run or of its nearest ancestor that has it, or the run's own stage, name or label.

    A field of "model" is that of the nearest training, since an evaluation takes its architecture from the weights. Several
    names, separated by commas, give their values side by side.
    """
    if "," in name:
        return " ".join(filter(None, (text_value(record, family, part.strip()) for part in name.split(","))))
    if not name:
        return ""
    if name in ("stage", "name", "label"):
        return str(getattr(record, name))
    runs = [record, *ancestors(record, family)]
    if name.startswith("model."):
        runs = [r for r in runs if r.stage != "evaluate"]
    return next((found for r in runs if (found := r.tags.get(name) or r.params.get(name))), "")
