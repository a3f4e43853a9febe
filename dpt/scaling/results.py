"""Evaluation runs as rows of a table, read back from MLflow.

An evaluation logs `eval/TASK/METRIC` (or `eval/TASK/DATASET/METRIC`) for its main setting, the same with `/sSTEPS_nENSEMBLE`
for every setting, and `eval/depth/baseline_METRIC` for the best constant prediction.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from dpt.scaling.compute import prediction_macs
from dpt.tracking.read import RunRecord

_SETTING = re.compile(r"s(\d+)_n(\d+)$")
_BASELINE = "baseline_"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is shown: `value * scale` with `digits`, under `title`."""

    title: str
    scale: float
    digits: int
    lower_is_better: bool = True


METRICS: dict[str, Metric] = {
    "abs_rel": Metric(title="AbsRel % ↓", scale=100, digits=2),
    "delta1": Metric(title="δ1 % ↑", scale=100, digits=1, lower_is_better=False),
    "epe": Metric(title="EPE px ↓", scale=1, digits=3),
    "epe_fit": Metric(title="EPE px, fitted ↓", scale=1, digits=3),
    "iou": Metric(title="mIoU % ↑", scale=100, digits=1, lower_is_better=False),
    "iou_pooled": Metric(title="pooled IoU % ↑", scale=100, digits=1, lower_is_better=False),
}
MAIN_METRIC = {"depth": "abs_rel", "flow": "epe", "amodal": "iou"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model under one setting on one data set. `baseline` rows hold the best constant prediction."""

    label: str
    task: str
    dataset: str
    steps: int | None
    ensemble: int | None
    metrics: dict[str, float]
    baseline: dict[str, float] = field(default_factory=dict)
    macs: float | None = None
    """Multiply-accumulates of one prediction: forward x steps x members x passes."""
    run: RunRecord | None = None

    def share(self, metric: str) -> float | None:
        """The metric as a share of the best constant prediction's."""
        base = self.baseline.get(metric)
        value = self.metrics.get(metric)
        return value / base if base and value is not None else None


def results_table(records: Iterable[RunRecord]) -> list[Row]:
    """Rows in the order of the runs, the best constant prediction first; of runs with one label the newest counts."""
    newest: dict[tuple[str, str, str, int | None, int | None], Row] = {}
    for record in sorted(records, key=lambda r: r.start_time):
        for row in _rows(record):
            key = (row.label, row.task, row.dataset, row.steps, row.ensemble)
            newest.pop(key, None)
            newest[key] = row
    rows = sorted(newest.values(), key=lambda r: (r.task, r.dataset))
    groups = dict.fromkeys((r.task, r.dataset) for r in rows)
    table = []
    for task, dataset in groups:
        group = [r for r in rows if (r.task, r.dataset) == (task, dataset)]
        base = next((r.baseline for r in group if r.baseline), None)
        if base:
            table.append(
                Row(label="best constant", task=task, dataset=dataset, steps=None, ensemble=None, metrics=base, baseline=base)
            )
        table += group
    return table


def _rows(record: RunRecord) -> list[Row]:
    values: dict[tuple[str, str, int | None, int | None], dict[str, float]] = {}
    baselines: dict[tuple[str, str], dict[str, float]] = {}
    for name, value in record.metrics.items():
        parts = name.split("/")
        if parts[0] != "eval" or len(parts) < 3:
            continue
        setting = _SETTING.fullmatch(parts[-1])
        steps, ensemble = (int(setting[1]), int(setting[2])) if setting else (None, None)
        _, task, *dataset, metric = parts[:-1] if setting else parts
        where = "/".join(dataset)
        if metric.startswith(_BASELINE):
            baselines.setdefault((task, where), {})[metric.removeprefix(_BASELINE)] = value
        else:
            values.setdefault((task, where, steps, ensemble), {})[metric] = value
    rows = []
    for (task, where, steps, ensemble), metrics in values.items():
        if steps is None:
            if any(k[:2] == (task, where) and k[2] is not None for k in values):
                continue  # the main setting, listed again under its own name
            steps, ensemble = _only(record, "steps"), _only(record, "ensemble")
        rows.append(
            Row(
                label=record.label,
                task=task,
                dataset=where or _dataset(record),
                steps=steps,
                ensemble=ensemble,
                metrics=metrics,
                baseline=baselines.get((task, where), {}),
                macs=_macs(record, task, steps, ensemble),
                run=record,
            )
        )
    return sorted(rows, key=lambda r: (r.dataset, r.steps or 0, r.ensemble or 0))


def _only(record: RunRecord, name: str) -> int | None:
    """The single value of a swept field of the recipe; None if it is swept or absent."""
    try:
        values = json.loads(record.params.get(f"evaluation.{name}", "[]"))
    except ValueError:
        return None
    return int(values[0]) if isinstance(values, list) and len(values) == 1 else None


def _dataset(record: RunRecord) -> str:
    return record.tags.get("dpt.dataset", "") or record.params.get("evaluation.protocol", "")


def _macs(record: RunRecord, task: str, steps: int | None, ensemble: int | None) -> float | None:
    forward = record.metrics.get("compute/forward_macs")
    if forward is None or steps is None or ensemble is None:
        return None
    guidance = float(record.params.get("evaluation.guidance_scale", 1.0))
    return prediction_macs(forward, task=task, steps=steps, ensemble=ensemble, guidance_scale=guidance)


def shown_metrics(rows: Iterable[Row]) -> list[str]:
    """The metrics that a table of these rows shows, in the order of METRICS."""
    present = {name for row in rows for name in row.metrics}
    return [name for name in METRICS if name in present]


def table_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the results of one task on one data set."""
    metrics = shown_metrics(rows)
    main = MAIN_METRIC.get(rows[0].task, metrics[0] if metrics else "")
    with_share = any(r.baseline for r in rows) and METRICS[main].lower_is_better
    header = ["model", "steps", "ensemble", *(METRICS[m].title for m in metrics)]
    header += ["of constant's"] if with_share else []
    header += ["MACs / prediction"]
    cells = []
    for row in rows:
        values = [show(m, row.metrics.get(m)) for m in metrics]
        if with_share:
            share = row.share(main)
            values.append("–" if share is None else f"{share:.2f}")
        cells.append([row.label, _number(row.steps), _number(row.ensemble), *values, show_macs(row.macs)])
    return header, cells


def show(metric: str, value: float | None) -> str:
    """A metric's value as its table shows it."""
    shown = METRICS[metric]
    return "–" if value is None else f"{value * shown.scale:.{shown.digits}f}"


def show_macs(macs: float | None) -> str:
    """MACs with three digits and a prefix, e.g. "1.23 T"."""
    if not macs:
        return "–"
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if macs >= factor:
            return f"{macs / factor:.3g} {prefix}"
    return f"{macs:.3g}"


def _number(value: int | None) -> str:
    return "–" if value is None else str(value)


def format_table(rows: list[Row]) -> str:
    """The results as plain text, one block for each task and data set."""
    if not rows:
        return "(no evaluation has been recorded)"
    blocks = []
    for task, dataset in dict.fromkeys((r.task, r.dataset) for r in rows):
        header, cells = table_cells([r for r in rows if (r.task, r.dataset) == (task, dataset)])
        blocks.append(" on ".join(p for p in (task, dataset) if p) + "\n" + format_cells(header, cells))
    return "\n\n".join(blocks)


def format_cells(header: list[str], cells: list[list[str]]) -> str:
    """Cells as aligned plain text; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * w for w in widths], *cells]:
        fields = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(fields).rstrip())
    return "\n".join(lines)
