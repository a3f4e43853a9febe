"""Runs side by side: differing recipe fields, metrics, compute, cost and descent; as text, CSV or a page with curves."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dpt.scaling import plots
from dpt.scaling.compute import total_train_macs, train_macs
from dpt.scaling.page import chart, grid, page, table
from dpt.scaling.points import along, final_value
from dpt.scaling.results import evaluation_rows, format_cells, setting_words, show_macs
from dpt.scores import METRICS, show
from dpt.tracking.read import RunRecord, ancestors

TRAINING_METRICS = (
    "train/loss",
    "train/grad_norm",
    "perf/samples_per_second",
    "perf/mfu",
    "perf/matrix_peak_share",
    "perf/memory_gib",
)
_IN_PER_CENT = ("perf/mfu", "perf/matrix_peak_share")
_CURVES = ("train/loss", "train/load_balancing_loss")
_OWN_FIELDS = ("tracking.", "training.output_dir", "evaluation.output_dir", "hardware")
"""Fields that differ between any two runs and say nothing."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One column of values per run, all as text; `groups` names the kinds of rows in order."""

    runs: list[RunRecord]
    groups: dict[str, dict[str, list[str]]]
    """Group -> property -> a value for each run."""

    def rows(self) -> dict[str, list[str]]:
        """All properties in order."""
        return {name: values for group in self.groups.values() for name, values in group.items()}


def compare(
    records: Sequence[RunRecord], family: Sequence[RunRecord], *, metrics: Sequence[str] = (), price: float = 0.0
) -> Comparison:
    """Compare runs; `family` holds them and their ancestors; `metrics` adds to those shown; `price` is of one device-hour."""
    runs = list(records)
    groups = {
        "run": {
            "stage": [r.stage or "–" for r in runs],
            "status": [r.status.lower() for r in runs],
            "from": [" < ".join(a.name for a in ancestors(r, family)) or "–" for r in runs],
        },
        "recipe": differing_fields(runs),
        "metrics": _metric_rows(runs, metrics),
        "compute": {
            "MACs": [show_macs(train_macs(r)) for r in runs],
            "MACs with ancestors": [show_macs(total_train_macs(r, family)) for r in runs],
            "hours": [_hours(r) for r in runs],
            "devices": [r.tags.get("dpt.ranks", "–") for r in runs],
        },
    }
    if price:
        groups["compute"]["cost"] = [f"{_device_hours(r) * price:.2f}" for r in runs]
    return Comparison(runs=runs, groups=groups)


def differing_fields(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """The recipe fields whose values differ among the runs that use them; "–" where a run's stage does not use one."""
    used = [{name: value for name, value in run.params.items() if _is_used(name, run.stage)} for run in runs]
    names = sorted({name for fields in used for name in fields})
    columns = {name: [fields.get(name, "–") for fields in used] for name in names}
    return {name: values for name, values in columns.items() if len({*values} - {"–"}) > 1}


def _is_used(name: str, stage: str) -> bool:
    if name.startswith(_OWN_FIELDS):
        return False
    if stage == "evaluate":
        return name.startswith(("evaluation.", "generation.")) or name == "task"
    only = {"evaluation": "evaluate", "generation": "evaluate", "upcycling": "upcycle", "sampling": "pretrain"}
    return only.get(name.partition(".")[0], stage) == stage


def _metric_rows(runs: Sequence[RunRecord], extra: Sequence[str]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for name in (*TRAINING_METRICS, *extra):
        if not any(name in r.metrics for r in runs):
            continue
        title, scale = (f"{name} %", 100.0) if name in _IN_PER_CENT else (name, 1.0)
        histories = [r.history(name) if name in r.metrics else [] for r in runs]
        rows[f"{title} (end)"] = [f"{scale * final_value(h):.5g}" if h else "–" for h in histories]
        if name == "train/loss" or name in extra:
            rows[f"{title} (least)"] = [f"{scale * min(v for _, v in h):.5g}" if h else "–" for h in histories]
    scores: dict[str, dict[str, str]] = {}
    for run in runs:
        for row in evaluation_rows(run):
            for metric, about in METRICS.items():
                if row.run is not None and metric in row.metrics:
                    place = "/".join(p for p in (row.task, row.dataset) if p)
                    name = f"{place}: {about.title}, {setting_words(row)}"
                    scores.setdefault(name, {})[run.run_id] = show(metric, row.metrics[metric])
    for name, values in scores.items():
        rows[name] = [values.get(r.run_id, "–") for r in runs]
    return rows


def _hours(run: RunRecord) -> str:
    return f"{(run.end_time - run.start_time) / 3600:.3f}" if run.end_time else "–"


def _device_hours(run: RunRecord) -> float:
    seconds = run.end_time - run.start_time if run.end_time else 0.0
    return seconds / 3600 * int(run.tags.get("dpt.ranks", "1"))


def as_text(comparison: Comparison) -> str:
    """One column per run; long values lose their beginnings."""
    header = ["", *(_short(r.name) for r in comparison.runs)]
    return format_cells(header, [[name, *map(_short, values)] for name, values in comparison.rows().items()])


def as_csv(comparison: Comparison) -> str:
    """One line per run, values in full."""
    rows = comparison.rows()
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run_id", "name", *rows])
    for number, run in enumerate(comparison.runs):
        writer.writerow([run.run_id, run.name, *(values[number] for values in rows.values())])
    return buffer.getvalue()


def as_html(comparison: Comparison, family: Sequence[RunRecord]) -> str:
    """A page: the table in groups, and curves over steps, samples and MACs."""
    header = ["", *(r.name for r in comparison.runs)]
    sections = [
        (name, name.capitalize(), table(header, [[field, *values] for field, values in group.items()]) if group else "")
        for name, group in comparison.groups.items()
    ]
    sections.append(("curves", "Curves", _curves(comparison.runs, family)))
    experiments = ", ".join(dict.fromkeys(r.experiment for r in comparison.runs))
    head = f'<div class="soft">{len(comparison.runs)} runs of {escape(experiments)}</div>'
    return page("Comparison", head, sections)


def _curves(runs: Sequence[RunRecord], family: Sequence[RunRecord]) -> str:
    figures = []
    for metric in _CURVES:
        histories = {r.run_id: r.history(metric) for r in runs if metric in r.metrics}
        for x, label in {"steps": "optimizer step", "samples": "samples seen", "macs": "MACs, ancestors included"}.items():
            series = {r.name: along(r, family, x, histories[r.run_id]) for r in runs if r.run_id in histories}
            series = {name: points for name, points in series.items() if len(points) > 1}
            if series:
                positive = all(y > 0 for points in series.values() for _, y in points)
                figure = plots.curves(series, label, plots.WORDS[metric], log_x=x == "macs", log_y=positive)
                figures.append(chart(figure, f"{plots.WORDS[metric]} over {label}"))
    return grid(figures)


def _short(text: str, most: int = 22) -> str:
    return text if len(text) <= most else "…" + text[1 - most :]
