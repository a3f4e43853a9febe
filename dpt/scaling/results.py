"""Evaluation runs as rows of a table, read back from MLflow.

An evaluation logs `eval/TASK/DATASET/METRIC` (and `eval/TASK/METRIC`, if the task has one set) for its main setting, the same
with `/sSTEPS_nENSEMBLE` for every setting (the metric "macs" is a prediction's mean MACs),
`baseline_METRIC` for what a prediction must beat, `ceiling_METRIC` for the truth sent through the VAE and back, and, for masks,
`code_METRIC` for the truth through the image code alone (`dpt.scores.EXPLANATIONS`).
"""

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from dpt.scaling.compute import prediction_macs
from dpt.scores import BASELINES, CEILING, CODE, MAIN_METRIC, METRICS, show
from dpt.tracking.read import RunRecord

_SETTING = re.compile(r"s(\d+)_n(\d+)$")
_REFERENCES = ("baseline_", "code_", "ceiling_")
_RENAMED = {"miou": "iou"}
"""Metrics that older runs recorded under another name."""
_PROTOCOL = re.compile(r"(?:^|; )([^:;]+): (\w+) v\d+(?:, N=\d+( \(synthetic\))?)?")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model under one setting on one data set."""

    label: str
    task: str
    dataset: str
    steps: int | None
    ensemble: int | None
    metrics: dict[str, float]
    baseline: dict[str, float] = field(default_factory=dict)
    """Metrics of the baseline that a prediction must beat, such as the best constant."""
    macs: float | None = None
    """Multiply-accumulates of one prediction: forward x steps x members x passes."""
    protocol: str = ""
    num_samples: int = 0
    """Samples scored; 0: not recorded."""
    synthetic: bool = False
    """Whether the set's samples are our rendered scenes."""
    run: RunRecord | None = None
    """None for the references, such as the best constant, and the truth through the VAE."""
    vae: str = ""
    """Of the truth through the VAE: which one."""

    def share(self, metric: str) -> float | None:
        """The metric as a share of the baseline's."""
        base = self.baseline.get(metric)
        value = self.metrics.get(metric)
        return value / base if base and value is not None else None


def results_table(records: Iterable[RunRecord]) -> list[Row]:
    """Rows in the order of the runs, the references first; of runs with one label the newest counts."""
    newest: dict[tuple[str, str, str, int | None, int | None, str], Row] = {}
    for record in sorted(records, key=lambda r: r.start_time):
        for row in evaluation_rows(record):
            key = (row.task, row.dataset, row.label, row.steps, row.ensemble, row.vae)
            newest.pop(key, None)
            newest[key] = row
    rows = sorted(newest.values(), key=lambda r: (r.task, r.dataset))
    table = []
    for _, group in itertools.groupby(rows, key=lambda r: (r.task, r.dataset)):
        members = list(group)
        references = {r.label: r for r in members if r.run is None}
        table += [references[label] for label in (*BASELINES.values(), CODE) if label in references]
        found = [r for r in members if r.run is None and r.label == CEILING]
        ceilings = list({tuple(r.metrics.items()): r for r in found}.values())  # one VAE may go by two names
        table += ceilings if len(ceilings) == 1 else [replace(r, label=f"{CEILING}, {r.vae}") for r in ceilings]
        table += [r for r in members if r.run is not None]
    return table


def evaluation_rows(record: RunRecord) -> list[Row]:
    """The rows of one evaluation run, its references first on every data set."""
    places: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for name, value in record.metrics.items():
        parts = name.split("/")
        if parts[0] != "eval" or len(parts) < 3:
            continue
        setting = parts.pop() if _SETTING.fullmatch(parts[-1]) else ""
        task, metric, dataset = parts[1], parts[-1], "/".join(parts[2:-1])
        for prefix in _REFERENCES:
            if metric.startswith(prefix):
                setting, metric = prefix, metric.removeprefix(prefix)
        metric = _RENAMED.get(metric, metric)
        places.setdefault((task, dataset), {}).setdefault(setting, {})[metric] = value
    rows = []
    named = {task for task, dataset in places if dataset}
    for (task, dataset), by_setting in places.items():
        if task in named and not dataset:  # the only set of its task, which is recorded under its own name as well
            continue
        rows += _place_rows(record, task, dataset or record.tags.get("dpt.dataset", ""), by_setting)
    return rows


def _place_rows(record: RunRecord, task: str, dataset: str, by_setting: dict[str, dict[str, float]]) -> list[Row]:
    """The rows of one task on one data set; `by_setting` has metrics for "sS_nN", for a reference's prefix, and for ""."""
    protocols = {name: rest for name, *rest in _PROTOCOL.findall(record.tags.get("dpt.protocol", ""))}
    protocol, synthetic = protocols.get(dataset, ("", ""))
    labels = {"baseline_": BASELINES.get(task, "best constant"), "code_": CODE, "ceiling_": CEILING}
    frame = Row(
        label=record.label,
        task=task,
        dataset=dataset,
        steps=None,
        ensemble=None,
        metrics={},
        baseline=by_setting.get("baseline_", {}),
        protocol=protocol,
        synthetic=bool(synthetic),
        num_samples=round(by_setting.get("", {}).get("num_samples", 0)),
    )
    rows = [replace(frame, label=labels[p], metrics=by_setting[p]) for p in _REFERENCES if p in by_setting]
    vae = record.tags.get("dpt.vae") or record.params.get("data.vae", "")
    rows = [replace(row, vae=vae) if row.label == CEILING else row for row in rows]
    matches = (_SETTING.fullmatch(name) for name in by_setting)
    settings: list[tuple[int | None, int | None]] = sorted((int(m[1]), int(m[2])) for m in matches if m)
    if not settings and "" in by_setting:  # a single setting, named by the recipe alone
        settings = [(_only(record, "steps"), _only(record, "ensemble"))]
    for steps, ensemble in settings:
        metrics = by_setting.get(f"s{steps}_n{ensemble}") or by_setting[""]
        macs = metrics.get("macs") or _macs(record, task, steps, ensemble)
        metrics = {name: value for name, value in metrics.items() if name != "macs"}
        rows.append(replace(frame, steps=steps, ensemble=ensemble, metrics=metrics, macs=macs, run=record))
    return rows


def _only(record: RunRecord, name: str) -> int | None:
    """The single value of a swept field of the recipe; None if it is swept or absent."""
    try:
        values = json.loads(record.params.get(f"evaluation.{name}", "[]"))
    except ValueError:
        return None
    return int(values[0]) if isinstance(values, list) and len(values) == 1 else None


def _macs(record: RunRecord, task: str, steps: int | None, ensemble: int | None) -> float | None:
    """MACs of one prediction for records without them, as if every image had the model's own size."""
    forward = record.metrics.get("compute/forward_macs")
    if forward is None or steps is None or ensemble is None:
        return None
    guidance = float(record.params.get("evaluation.guidance_scale", 1.0))
    return prediction_macs(forward, task=task, steps=steps, ensemble=ensemble, guidance_scale=guidance)


def setting_words(row: Row) -> str:
    """Steps and members in words, such as "10 steps × 5 samples"."""
    if row.steps is None:
        return "recipe's setting"
    return f"{row.steps} step{'s' * (row.steps != 1)}" + (f" × {row.ensemble} samples" if (row.ensemble or 1) > 1 else "")


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
    header += [f"{BASELINES.get(rows[0].task, 'baseline')} = 1"] if with_share else []
    header += ["MACs / prediction"]
    cells = []
    for row in rows:
        values = [show(m, row.metrics.get(m)) for m in metrics]
        if with_share:
            share = row.share(main)
            values.append("–" if share is None else f"{share:.2f}")
        cells.append([row.label, _number(row.steps), _number(row.ensemble), *values, show_macs(row.macs)])
    return header, cells


def show_macs(macs: float | None) -> str:
    """MACs with three digits and a prefix, e.g. "1.23 T"."""
    if not macs:
        return "–"
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if macs >= 0.9995 * factor:
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
    """Cells as aligned plain text: the first column flush left, the others flush right."""
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * w for w in widths], *cells]:
        fields = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(fields).rstrip())
    return "\n".join(lines)
