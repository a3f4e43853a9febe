"""One static HTML page about an experiment: results, pictures, lineage, curves, the paper's tables beside ours, recipes."""

import json
import math
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dpt.config.presets import PRESETS
from dpt.errors import UserError
from dpt.models.costs import num_params
from dpt.scaling import paper, plots
from dpt.scaling.compute import model_config, train_macs
from dpt.scaling.lineage import lineage_svg
from dpt.scaling.page import card, chart, grid, page, picture, table, write_page
from dpt.scaling.results import MAIN_METRIC, METRICS, Row, format_table, results_table, show, show_macs, table_cells
from dpt.tracking.read import RunRecord, ancestors, load_runs

__all__ = ["format_table", "results_table", "write_report"]

PICTURES_PER_RUN = 12
_CURVES = ("train/loss", "train/load_balancing_loss", "train/grad_norm")


def write_report(experiment: str, *, uri: str, out: Path) -> Path:
    """Write the page about `experiment` to `out` and return it; everything is inside the one file.

    Raises UserError if the store or the experiment is not there or holds no run.
    """
    runs = load_runs(uri, experiment=experiment)
    if not runs:
        raise UserError(f'experiment "{experiment}": {uri} holds no run of it; train or evaluate something first.')
    return write_page(out, render(experiment, runs, uri))


def render(experiment: str, runs: Sequence[RunRecord], uri: str) -> str:
    """The page as text."""
    rows = results_table(runs)
    shown = _shown(runs, rows)
    training = [r for r in shown if r.stage and r.stage != "evaluate"]
    sections = [
        ("results", "Results", _results(rows)),
        ("pictures", "Pictures", _pictures(training, rows)),
        ("lineage", "Which model comes from which", _lineage(training, rows)),
        ("curves", "Training curves", _curves(training)),
        ("paper", "Beside the paper", _paper(rows, training)),
        ("recipes", "Recipes", _recipes(shown)),
        ("versions", "Versions and where the runs are", _versions(runs, uri)),
    ]
    head = f'<div class="soft">{_when(runs, shown)}</div><div class="cards">{_cards(shown, rows)}</div>'
    return page(experiment, head, sections)


def _shown(runs: Sequence[RunRecord], rows: list[Row]) -> list[RunRecord]:
    """Without the runs that a newer one of the same name has superseded, but for those that a row descends from."""
    newest = {(r.stage, r.name): r.run_id for r in runs}
    kept = set(newest.values())
    for record in [row.run for row in rows if row.run is not None]:
        kept |= {record.run_id, *(a.run_id for a in ancestors(record, runs))}
    return [r for r in runs if r.run_id in kept]


def _when(runs: Sequence[RunRecord], shown: Sequence[RunRecord]) -> str:
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(max(r.end_time or r.start_time for r in runs)))
    superseded = len(runs) - len(shown)
    return f"{len(shown)} runs, the last one of {day}" + (f"; {superseded} superseded ones are left out" if superseded else "")


def _cards(runs: Sequence[RunRecord], rows: list[Row]) -> str:
    cards = []
    for task in dict.fromkeys(r.task for r in rows):
        metric = MAIN_METRIC.get(task, "")
        best = _best([r for r in rows if r.task == task and r.run], metric) if metric else None
        if best is not None:
            share = best.share(metric)
            note = f"{best.label}, {_setting(best)}" + (f"; {share:.2f} of the best constant's" if share is not None else "")
            cards.append(card(f"best {task} {METRICS[metric].title}", show(metric, best.metrics[metric]), note))
    training = [r for r in runs if train_macs(r)]
    if training:
        total = sum(map(train_macs, training))
        cards.append(card("training compute", f"{show_macs(total)}MACs", f"{len(training)} training runs"))
    cards.append(card("time of all runs", _duration(sum(r.end_time - r.start_time for r in runs if r.end_time)), ""))
    return "".join(cards)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _setting(row: Row) -> str:
    if row.steps is None:
        return "recipe's setting"
    return f"{row.steps} step{'s' * (row.steps != 1)}" + (f" × {row.ensemble} samples" if (row.ensemble or 1) > 1 else "")


def _best(rows: list[Row], metric: str) -> Row | None:
    scored = [r for r in rows if metric in r.metrics]
    sign = 1 if METRICS[metric].lower_is_better else -1
    return min(scored, key=lambda r: sign * r.metrics[metric], default=None)


def _results(rows: list[Row]) -> str:
    parts = []
    for task, dataset in dict.fromkeys((r.task, r.dataset) for r in rows):
        group = [r for r in rows if (r.task, r.dataset) == (task, dataset)]
        header, cells = table_cells(group)
        best = _best([r for r in group if r.run], MAIN_METRIC.get(task, next(iter(METRICS))))
        kinds = ["base" if r.run is None else "best" if r is best else "" for r in group]
        title = task.capitalize() + (f", {dataset}" if dataset else "")
        parts.append(f"<h3>{escape(title)}</h3>{table(header, cells, kinds)}")
        if any(r.baseline for r in group):
            parts.append('<p class="soft small">The best constant is the prediction without any information of the image, '
                         "aligned and scored like the others.</p>")  # fmt: skip
    return "".join(parts)


def _pictures(training: Sequence[RunRecord], rows: list[Row]) -> str:
    """Pictures of the evaluations in the table, the best model's first, then the last ones of the training runs."""
    ranked = sorted((r for r in rows if r.run is not None), key=_rank)
    parts = []
    for run in {r.run.run_id: r.run for r in ranked if r.run is not None}.values():
        paths = sorted(_picture_paths(run), key=lambda p: "random" not in p)  # the fair ones first
        figures = [_picture(run, path) for path in paths[:PICTURES_PER_RUN]]
        if figures:
            rest = f"<details><summary>more of them</summary>{grid(figures[1:])}</details>" if figures[1:] else ""
            parts.append(f"<h3>{escape(run.label)}</h3>{figures[0]}{rest}")
    for run in training:
        figures = [_picture(run, path) for path in _picture_paths(run)[-1:]]
        if figures:
            parts.append(f"<h3>{escape(run.label)}</h3>{grid(figures)}")
    return "".join(parts)


def _picture_paths(run: RunRecord) -> list[str]:
    return [p for p in run.artifacts("pictures") if p.endswith((".png", ".jpg", ".webp"))]


def _picture(run: RunRecord, path: str) -> str:
    return picture(run.download(path), Path(path).stem.replace("_", " "))


def _rank(row: Row) -> float:
    metric = MAIN_METRIC.get(row.task, "")
    value = row.metrics.get(metric, math.inf)
    return value if metric in METRICS and METRICS[metric].lower_is_better else -value


def _lineage(training: Sequence[RunRecord], rows: list[Row]) -> str:
    if not training:
        return ""
    notes: dict[str, str] = {}
    for row in rows:
        metric = MAIN_METRIC.get(row.task, "")
        if row.run is not None and row.run.parents and metric in row.metrics:
            mark = "AbsRel" if metric == "abs_rel" else metric
            notes[row.run.parents[0]] = f"{row.task} {mark} {show(metric, row.metrics[metric])}"
    note = '<p class="soft small">MACs count a run and all that it descends from.</p>'
    return f'<div class="scroll">{lineage_svg(training, notes)}</div>{note}'


def _curves(training: Sequence[RunRecord]) -> str:
    figures = []
    for stage in dict.fromkeys(r.stage for r in training):
        for metric in _CURVES:
            series = {r.label: r.history(metric) for r in training if r.stage == stage and metric in r.metrics}
            series = {label: points for label, points in series.items() if len(points) > 1}
            if series:
                positive = all(y > 0 for points in series.values() for _, y in points)
                figures.append(chart(plots.curves(series, "step", metric, log_y=positive), f"{stage}: {metric}"))
    return grid(figures)


def _paper(rows: list[Row], training: Sequence[RunRecord]) -> str:
    parts = [_model_table(training)]
    tables: list[tuple[str, str, dict[str, tuple[str, int]], dict[str, Any], list[str]]] = [
        ("Depth (the paper's Table 3)", "depth", paper.DEPTH_SETS, paper.DEPTH, ["abs_rel", "delta1"]),
        ("Optical flow (the paper's Table 4)", "flow", paper.FLOW_SETS, paper.FLOW, ["epe"]),
        ("Amodal segmentation (the paper's Table 5)", "amodal", paper.AMODAL_SETS, paper.AMODAL, ["iou"]),
    ]
    for title, task, sets, published, metrics in tables:
        ours = [r for r in rows if r.task == task and r.run is not None and _as_published(r, sets)]
        if ours:
            parts.append(f"<h3>{title}</h3>{_beside(ours, sets, published, metrics)}")
    return "".join(parts)


def _as_published(row: Row, sets: dict[str, tuple[str, int]]) -> bool:
    """Whether a row was scored by a published protocol on as many images as published."""
    return row.protocol in sets and sets[row.protocol][1] in (0, row.num_samples)


def _beside(ours: list[Row], sets: dict[str, tuple[str, int]], published: dict[str, Any], metrics: list[str]) -> str:
    """The published rows, then the newest of ours at its most expensive setting, over the protocols that we have scored."""
    scored = [s for s in sets if any(r.protocol == s for r in ours)]
    header = ["method", *(f"{sets[s][0]} {METRICS[m].title}" for s in scored for m in metrics)]
    cells, kinds, notes = [], [], []
    for method, values in published.items():
        absent = ["–"] * len(metrics)
        cells.append([method, *(c for s in scored for c in ([f"{v:g}" for v in values[s]] if s in values else absent))])
        kinds.append("base")
    for label in dict.fromkeys(r.label for r in ours):
        most: dict[str, Row] = {}
        for row in sorted((r for r in ours if r.label == label), key=lambda r: (r.steps or 0) * (r.ensemble or 1)):
            most[row.protocol] = row
        values = {name: row.metrics for name, row in most.items()}
        cells.append([f"ours: {label}", *(show(m, values.get(s, {}).get(m)) for s in scored for m in metrics)])
        kinds.append("ours")
        notes += [f"{label} on {sets[name][0]}: {_setting(row)}" for name, row in most.items()]
    return table(header, cells, kinds) + f'<p class="soft small">Ours: {escape("; ".join(notes))}.</p>'


def _model_table(training: Sequence[RunRecord]) -> str:
    """The models that were trained, beside the paper's where the preset is one of its own and unchanged."""
    header = ["model", "hidden size", "heads", "layers", "experts", "parameters (active / total)", "the paper's"]
    rows: dict[tuple[str, ...], None] = {}
    for run in training:
        config = model_config(run)
        if config is None:
            continue
        preset = PRESETS.get(config.preset, {})
        same = all(getattr(config, k) == preset.get(k) for k in ("hidden_size", "depth", "num_heads", "patch_size"))
        count = num_params(config)
        ours = " / ".join(f"{c / 1e6:,.1f} M" for c in dict.fromkeys((count.active, count.total)))
        experts = f"{config.num_experts}, top {config.top_k}" if config.num_experts else "–"
        name = config.preset if same else f"{config.preset}, changed"
        is_published = same and config.preset in paper.MODELS and run.stage != "upcycle"
        published = str(paper.MODELS[config.preset]["params"]) if is_published else "–"
        rows[(name, str(config.hidden_size), str(config.num_heads), str(config.depth), experts, ours, published)] = None
    return f"<h3>Models (the paper's Tables 1 and 2)</h3>{table(header, [list(r) for r in rows])}" if rows else ""


def _recipes(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        recipe = run.recipe()
        if recipe:
            text = escape(json.dumps(recipe, indent=2))
            command = run.tags.get("dpt.command", "")
            head = f"<p class='small'><code>{escape(command)}</code></p>" if command else ""
            title = escape(f"{run.name} · {run.stage} · {run.status.lower()}")
            link = f"<p class='small'><a href='{escape(run.url)}'>this run in MLflow</a></p>" if run.url else ""
            parts.append(f"<details><summary>{title}</summary>{link}{head}<pre>{text}</pre></details>")
    return "".join(parts)


def _versions(runs: Sequence[RunRecord], uri: str) -> str:
    newest = runs[-1].tags
    versions = {"dpt": newest.get("dpt.version", "")} | json.loads(newest.get("dpt.versions", "{}"))
    if newest.get("mlflow.source.git.commit"):
        versions["commit"] = newest["mlflow.source.git.commit"][:12]
    listed = ", ".join(f"{escape(name)} {escape(version)}" for name, version in versions.items() if version)
    return (
        f'<p class="small">{listed}.</p><p>Every number above is read from the MLflow runs in <code>{escape(uri)}</code>; '
        f"look at them with <code>mlflow ui --backend-store-uri {escape(uri)}</code>.</p>"
    )
