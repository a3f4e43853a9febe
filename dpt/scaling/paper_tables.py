"""The paper's tables with our results beside them, as a report shows them."""

from collections.abc import Sequence
from html import escape
from typing import Any

from dpt.config.presets import PRESETS
from dpt.models.costs import num_params
from dpt.scaling import paper
from dpt.scaling.compute import model_config
from dpt.scaling.page import table
from dpt.scaling.results import Row, setting_words
from dpt.scores import METRICS, show
from dpt.tracking.read import RunRecord


def paper_tables(rows: list[Row], training: Sequence[RunRecord]) -> str:
    """The models trained, and the results by published protocols, beside the paper's; "" if there are none."""
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
    return row.protocol in sets and not row.synthetic and sets[row.protocol][1] in (0, row.num_samples)


def _beside(ours: list[Row], sets: dict[str, tuple[str, int]], published: dict[str, Any], metrics: list[str]) -> str:
    """The published rows, then our newest at its most expensive setting, over the protocols that we have scored."""
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
        notes += [f"{label} on {sets[name][0]}: {setting_words(row)}" for name, row in most.items()]
    return table(header, cells, kinds) + f'<p class="soft small">Ours: {escape("; ".join(notes))}.</p>'


def _model_table(training: Sequence[RunRecord]) -> str:
    """The trained models, beside the paper's where the preset is one of the paper's and unchanged."""
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
        published = paper.MODELS.get(config.preset, "–") if same and run.stage != "upcycle" else "–"
        rows[(name, str(config.hidden_size), str(config.num_heads), str(config.depth), experts, ours, published)] = None
    return f"<h3>Models (the paper's Tables 1 and 2)</h3>{table(header, [list(r) for r in rows])}" if rows else ""
