"""A figure like the paper's: runs as points in log-log, the laws that they support, and both as data."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpt.errors import UserError
from dpt.scaling.laws import Fit, fit_power_law, frontier
from dpt.scaling.plots import WORDS, law_figure, save
from dpt.scaling.points import X_NAMES, FigureSpec, Point, collect
from dpt.scaling.repeats import Mean, as_markdown, means
from dpt.scaling.shares import Share, shares
from dpt.scaling.shares import as_markdown as shares_as_markdown
from dpt.scores import METRICS, Metric
from dpt.tracking.read import RunRecord


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The points of a figure, the laws that they support, and why some support none."""

    spec: FigureSpec
    points: list[Point]
    chosen: list[Point]
    """The frontier; empty if none was asked for."""
    fits: dict[str, Fit]
    refusals: list[str]
    means: list[Mean] = field(default_factory=list)
    """The points over repeats; empty if none were asked for."""
    shares: list[Share] = field(default_factory=list)
    """Shares of compute that the others need to match `reference`; empty if there is none."""

    def groups(self) -> dict[str, list[Point]]:
        """The points by group, in order of appearance."""
        return {name: [p for p in self.points if p.group == name] for name in dict.fromkeys(p.group for p in self.points)}

    def sentences(self) -> list[str]:
        """A line for each law, with the unit of its y."""
        unit = unit_words(self.spec.y)
        return [
            f"{name + ': ' if name else ''}{fit.sentence(self.spec.y, self.spec.x)}{f'; y {unit}' if unit else ''}"
            for name, fit in self.fits.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """Laws and points, for the file beside the figure."""
        return {
            "figure": asdict(self.spec),
            "laws": {
                name: {
                    **asdict(fit.law),
                    "equation": fit.law.equation(),
                    "interval_a": fit.interval_a,
                    "interval_b": fit.interval_b,
                    "interval_c": fit.interval_c,
                    "r2": fit.r2,
                    "holdout_error": fit.holdout_error,
                }
                for name, fit in self.fits.items()
            },
            "refusals": self.refusals,
            "means": [
                {
                    "x": m.x,
                    "y": m.y,
                    "half_width": m.half_width if len(m.runs) > 1 else None,
                    "group": m.group,
                    "runs": len(m.runs),
                }
                for m in self.means
            ],
            "shares": [{name: None if value != value else value for name, value in asdict(s).items()} for s in self.shares],
            "points": [{"x": p.x, "y": p.y, "group": p.group, "run": p.run.name, "run_id": p.run.run_id} for p in self.points],
        }


def find(records: Sequence[RunRecord], family: Sequence[RunRecord], spec: FigureSpec) -> Findings:
    """Collect the points of a figure and fit its laws; UserError if there are no points."""
    points = collect(records, family, spec)
    repeats = means(points, spec.over) if spec.over else []
    needed = shares(records, family, spec) if spec.reference else []
    findings = Findings(spec=spec, points=points, chosen=[], fits={}, refusals=[], means=repeats, shares=needed)
    groups = findings.groups()
    if spec.frontier:
        findings.chosen.extend(points[i] for i in frontier([p.x for p in points], [p.y for p in points]))
        groups = {"": points}
    for name, group in groups.items() if spec.law else ():
        x, y, runs = ([getattr(p, part) for p in group] for part in ("x", "y", "run"))
        try:
            findings.fits[name] = fit_power_law(
                x, y, offset=spec.offset, runs=[r.run_id for r in runs], on_frontier=spec.frontier
            )
        except UserError as error:
            findings.refusals.append(f"{name}: {error}" if name else str(error))
    return findings


def _x_label(spec: FigureSpec) -> str:
    """Label of the x axis; the steps of a curve are training steps."""
    return "training steps" if spec.curve and spec.x == "steps" else X_NAMES.get(spec.x, spec.x)


def metric_label(y: str) -> str:
    """Axis label of a metric, or of "1-METRIC"."""
    complement, name = (True, y[2:]) if y.startswith("1-") else (False, y)
    shown = _shown(name)
    title = WORDS.get(name, name) if shown is None else shown.name
    unit = unit_words(y).removeprefix("in ")
    return f"{'1 - ' if complement else ''}{title}{f', {unit}' if unit else ''}"


def unit_words(y: str) -> str:
    """The unit of the recorded values of a metric, or of "1-METRIC", which laws are fitted to: "as a share", "in px" or ""."""
    shown = _shown(y.removeprefix("1-"))
    return {"%": "as a share", "px": "in px"}.get(shown.unit, "") if shown else ""


def _shown(name: str) -> Metric | None:
    """How tables show a metric of evaluations; None for others."""
    return METRICS.get(name.rpartition("/")[2]) if name.startswith("eval/") else None


def draw(findings: Findings, path: Path, *, watermark: str = "") -> Path:
    """Write the figure in the format of the file's suffix, and its data beside it as JSON, and as a table where runs repeat.

    `watermark` is drawn across the figure.
    """
    spec = findings.spec
    pairs = {name: [(p.x, p.y) for p in group] for name, group in findings.groups().items()}
    bars = {name: [(m.x, m.y, m.half_width) for m in findings.means if m.group == name] for name in pairs}
    ringed = [(p.x, p.y) for p in findings.chosen]
    joined = not spec.curve and (spec.frontier or not spec.law)
    figure = law_figure(pairs, findings.fits, _x_label(spec), metric_label(spec.y), chosen=ringed, join=joined, bars=bars)
    if watermark:
        figure.text(0.5, 0.5, watermark, fontsize=48, color="#e03131", alpha=0.35, rotation=25, ha="center", va="center")
    save(figure, path)
    content = ({"watermark": watermark} if watermark else {}) | findings.as_json()
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    tables = []
    if findings.means:
        shown = METRICS.get(spec.y.rpartition("/")[2])
        y_name, scale, digits = (
            (shown.title, shown.scale, shown.digits) if shown and not spec.y.startswith("1-") else (spec.y, 1.0, 4)
        )
        tables.append(as_markdown(findings.means, _x_label(spec), y_name, scale=scale, digits=digits))
    if findings.shares:
        tables.append(shares_as_markdown(findings.shares, spec.reference, spec.y))
    if tables:
        path.with_suffix(".md").write_text("\n".join([f"{watermark}\n"] * bool(watermark) + tables), encoding="utf-8")
    return path
