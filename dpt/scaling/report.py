"""One static HTML page about an experiment: the best result first, then tables, scenes, lineage, curves, the paper, recipes."""

import json
import math
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from dpt.errors import UserError, hide_passwords
from dpt.scaling import plots
from dpt.scaling.compute import train_macs
from dpt.scaling.lineage import lineage_svg
from dpt.scaling.page import bars, card, chart, grid, page, picture, table, write_page
from dpt.scaling.paper_tables import paper_tables
from dpt.scaling.results import Row, results_table, setting_words, show_macs, table_cells
from dpt.scaling.scenes import ShownScenes, headline_picture, read_scenes, scenes_section
from dpt.scores import BASELINES, EXPLANATIONS, MAIN_METRIC, METRICS, say, show
from dpt.tracking.read import RunRecord, ancestors, load_runs

PICTURES_PER_RUN = 12
MOST_BARS, MOST_CURVES = 8, 12
"""Most models beside the headline, and most runs in a figure of curves; the table has all."""
_CURVES = ("train/loss", "train/load_balancing_loss", "train/grad_norm")


def write_report(experiment: str, *, uri: str, out: Path) -> Path:
    """Write the page about `experiment` to `out` and return it; everything is inside the one file.

    Raises UserError if the store or the experiment does not exist or holds no run.
    """
    runs = load_runs(uri, experiment=experiment)
    if not runs:
        raise UserError(f'experiment "{experiment}": {uri} holds no run of it; train or evaluate something first.')
    return write_page(out, render(experiment, runs, uri))


def render(experiment: str, runs: Sequence[RunRecord], uri: str) -> str:
    """The page as text."""
    rows = results_table(runs)
    scenes = {(s.row.task, s.row.dataset, s.row.label): s for s in map(read_scenes, _main_rows(rows)) if s is not None}
    shown = _shown(runs, rows)
    training = [r for r in shown if r.stage and r.stage != "evaluate"]
    sections = [
        ("results", "Results", _results(rows)),
        ("compute", "At a glance", f'<div class="cards">{_cards(shown, rows)}</div>'),
        ("scenes", "The same scenes, model by model", _scenes(rows, list(scenes.values()))),
        ("pictures", "More pictures", _pictures(training, rows)),
        ("lineage", "Which model comes from which", _lineage(training, rows)),
        ("curves", "Training curves", _curves(training)),
        ("paper", "Beside the paper", paper_tables(rows, training)),
        ("recipes", "Recipes", _recipes(shown)),
        ("versions", "Versions and where the runs are", _versions(runs, uri)),
    ]
    head = f'<div class="soft">{_when(runs, shown)}</div>{_headline(rows, scenes)}'
    return page(experiment, head, sections)


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows by task and set, in the order of the table."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.dataset), []).append(row)
    return groups


def _main_rows(rows: Sequence[Row]) -> list[Row]:
    """Each model's last (largest) setting on each set, best first."""
    last = {(r.task, r.dataset, r.label): r for r in sorted(rows, key=lambda r: (r.steps or 0) * (r.ensemble or 1)) if r.run}
    return sorted(last.values(), key=_rank)


def _about(row: Row) -> str:
    """The task, the set, and the number and kind of samples, in words."""
    count = f", {row.num_samples:,} {'synthetic ' * row.synthetic}samples" if row.num_samples else ""
    return row.task.capitalize() + (f" on {row.dataset}" if row.dataset else "") + count


def _headline(rows: Sequence[Row], scenes: dict[tuple[str, str, str], ShownScenes]) -> str:
    """The best model of the first task: its figure, the others' beside it, and a typical scene."""
    for task, metric in MAIN_METRIC.items():
        for group in _groups([r for r in rows if r.task == task]).values():
            best = _best([r for r in group if r.run], metric)
            if best is not None:
                found = scenes.get((task, best.dataset, best.label))
                shown = headline_picture(found, found.row.metrics[metric]) if found is not None else _first_picture(best)
                return f'<section class="hero">{_headline_figure(group, best, metric)}{shown}</section>'
    return ""


def _headline_figure(group: list[Row], best: Row, metric: str) -> str:
    about = METRICS[metric]
    labels = dict.fromkeys(r.label for r in group if r.run)
    bests = (_best([r for r in group if r.run and r.label == label], metric) for label in labels)
    ranked = sorted((r for r in bests if r is not None), key=_rank)
    words = f"{about.words}; the best of {len(ranked)} models" if len(ranked) > 1 else about.words
    figure = f'<b class="big">{show(metric, best.metrics[metric])} {about.unit}</b> <span>{escape(about.name)}</span>'
    chosen = [r for r in group if r.run is None] + ranked[:MOST_BARS]
    values = [(r, r.metrics[metric]) for r in chosen if metric in r.metrics]
    lines = [
        (r.label, v * about.scale, show(metric, v), "base" if r.run is None else "best" if r is best else "") for r, v in values
    ]
    axis = f"{about.name}{', ' + about.unit if about.unit else ''} ({'lower' if about.lower_is_better else 'higher'} is better)"
    if len(ranked) > MOST_BARS:
        axis += f"; the best {MOST_BARS} of {len(ranked)} models"
    return (
        f'<div class="figure"><div><p class="soft">{escape(_about(best))}</p><p>{figure}</p>'
        f"<p>{escape(words[:1].upper() + words[1:])}: <b>{escape(best.label)}</b>, {setting_words(best)}.</p></div>"
        f"{bars(lines, axis)}</div>"
    )


def _first_picture(row: Row) -> str:
    """First picture of a model whose evaluation has kept no scenes; "" if it has none."""
    paths = _picture_paths(row.run) if row.run is not None else []
    return _picture(row.run, paths[0]) if row.run is not None and paths else ""


def _scenes(rows: Sequence[Row], shown: Sequence[ShownScenes]) -> str:
    parts = []
    for (task, dataset), group in _groups(rows).items():
        models = [s for s in shown if (s.row.task, s.row.dataset) == (task, dataset)]
        if models:
            parts.append(f"<h3>{escape(_about(group[-1]))}</h3>{scenes_section(models)}")
    return "".join(parts)


def _shown(runs: Sequence[RunRecord], rows: list[Row]) -> list[RunRecord]:
    """The runs without those that a newer one of the same name supersedes, except for ancestors of a row."""
    newest = {(r.stage, r.name): r.run_id for r in runs}
    kept = set(newest.values())
    for record in [row.run for row in rows if row.run is not None]:
        kept |= {record.run_id, *(a.run_id for a in ancestors(record, runs))}
    return [r for r in runs if r.run_id in kept]


def _when(runs: Sequence[RunRecord], shown: Sequence[RunRecord]) -> str:
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(max(r.end_time or r.start_time for r in runs)))
    superseded = len(runs) - len(shown)
    left_out = f"; {superseded} superseded {'one is' if superseded == 1 else 'ones are'} left out" if superseded else ""
    return f"{len(shown)} runs, the last one of {day}" + left_out


def _cards(runs: Sequence[RunRecord], rows: list[Row]) -> str:
    cards = []
    for task in dict.fromkeys(r.task for r in rows):
        metric = MAIN_METRIC.get(task, "")
        best = _best([r for r in rows if r.task == task and r.run], metric) if metric else None
        if best is not None:
            share = best.share(metric)
            note = f"{best.label}, {setting_words(best)}" + (
                f"; {share:.2f} where {BASELINES[task]} is 1" if share is not None else ""
            )
            cards.append(card(f"best {task} {METRICS[metric].title}", show(metric, best.metrics[metric]), note))
    training = [r for r in runs if train_macs(r)]
    if training:
        total = sum(map(train_macs, training))
        cards.append(card("training compute", f"{show_macs(total)}MACs", f"{len(training)} training runs"))
    cards.append(card("time of all runs", _duration(sum(r.end_time - r.start_time for r in runs if r.end_time)), ""))
    return "".join(cards)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _best(rows: list[Row], metric: str) -> Row | None:
    scored = [r for r in rows if metric in r.metrics]
    sign = 1 if METRICS[metric].lower_is_better else -1
    return min(scored, key=lambda r: sign * r.metrics[metric], default=None)


def _results(rows: list[Row]) -> str:
    parts = []
    for (task, _), group in _groups(rows).items():
        header, cells = table_cells(group)
        best = _best([r for r in group if r.run], MAIN_METRIC.get(task, next(iter(METRICS))))
        kinds = ["base" if r.run is None else "best" if r is best else "" for r in group]
        parts.append(f"<h3>{escape(_about(group[-1]))}</h3>{table(header, cells, kinds)}")
        references = dict.fromkeys(r.label.partition(",")[0] for r in group if r.run is None)
        for label in filter(EXPLANATIONS.__contains__, references):
            parts.append(f'<p class="soft small">{escape(label[:1].upper() + label[1:])}: {escape(EXPLANATIONS[label])}.</p>')
    return "".join(parts)


def _pictures(training: Sequence[RunRecord], rows: list[Row]) -> str:
    """Pages of the evaluations in the table, the best model's first, and the last pictures of the training runs."""
    ranked = sorted((r for r in rows if r.run is not None), key=_rank)
    parts = []
    for run in {r.run.run_id: r.run for r in ranked if r.run is not None}.values():
        figures = [_picture(run, path) for path in _picture_paths(run)[:PICTURES_PER_RUN]]
        if figures:
            parts.append(
                f"<details><summary>{escape(run.label)}: best, median and worst samples</summary>{grid(figures)}</details>"
            )
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
            notes[row.run.parents[0]] = f"{row.task} {say(metric, row.metrics[metric])}"
    note = '<p class="soft small">MACs count a run and all that it descends from.</p>'
    return f'<div class="scroll">{lineage_svg(training, notes)}</div>{note}'


def _curves(training: Sequence[RunRecord]) -> str:
    figures = []
    for stage in dict.fromkeys(r.stage for r in training):
        for metric in _CURVES:
            series = {r.label: r.history(metric) for r in training if r.stage == stage and metric in r.metrics}
            series = {label: points for label, points in series.items() if len(points) > 1}
            found, series = len(series), dict(list(series.items())[-MOST_CURVES:])
            if series:
                positive = all(y > 0 for points in series.values() for _, y in points)
                more = f": the last {len(series)} of {found} runs" if found > len(series) else ""
                figure = plots.curves(series, "optimizer step", plots.WORDS[metric], log_y=positive)
                figures.append(chart(figure, f"{stage}: {plots.WORDS[metric]} ({metric}){more}"))
    return grid(figures)


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
    uri = hide_passwords(uri)
    newest = runs[-1].tags
    versions = {"dpt": newest.get("dpt.version", "")} | json.loads(newest.get("dpt.versions", "{}"))
    if newest.get("mlflow.source.git.commit"):
        versions["commit"] = newest["mlflow.source.git.commit"][:12]
    listed = ", ".join(f"{escape(name)} {escape(version)}" for name, version in versions.items() if version)
    return (
        f'<p class="small">{listed}.</p><p>Every number above is read from the MLflow runs in <code>{escape(uri)}</code>; '
        f"look at them with <code>mlflow ui --backend-store-uri {escape(uri)}</code>.</p>"
    )
