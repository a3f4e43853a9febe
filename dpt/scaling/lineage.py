"""Who descends from whom: the training runs of an experiment as a drawn graph."""

from collections.abc import Mapping, Sequence
from html import escape

from dpt.scaling.compute import total_train_macs
from dpt.scaling.results import show_macs
from dpt.tracking.read import RunRecord

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 210, 66, 56, 16, 4
_STAGE_COLOURS = {"pretrain": "#1f6feb", "finetune": "#2b8a3e", "upcycle": "#d9480f"}


def places(runs: Sequence[RunRecord]) -> dict[str, tuple[int, int]]:
    """(column, row) of every run: columns are generations, a first child stays on its parent's row."""
    known = {r.run_id: r for r in runs}
    children: dict[str, list[RunRecord]] = {r.run_id: [] for r in runs}
    roots: list[RunRecord] = []
    for run in runs:
        parents = [p for p in run.parents if p in known]
        (children[parents[0]] if parents else roots).append(run)
    found: dict[str, tuple[int, int]] = {}

    def place(run: RunRecord, column: int, row: int) -> int:
        """Place a run and its descendants from `row` down; returns the first free row."""
        if run.run_id in found:
            return row
        found[run.run_id] = (column, row)
        free = row
        for child in children[run.run_id]:
            free = place(child, column + 1, free)
        return max(free, row + 1)

    free = 0
    for root in roots:
        free = place(root, 0, free)
    return found


def lineage_svg(runs: Sequence[RunRecord], notes: Mapping[str, str]) -> str:
    """An SVG of the runs and their descent; `notes` maps a run id to a line, such as its best result."""
    at = places(runs)
    columns = 1 + max((c for c, _ in at.values()), default=0)
    rows = 1 + max((r for _, r in at.values()), default=0)
    width = 2 * _MARGIN + columns * _WIDTH + (columns - 1) * _GAP_X
    height = 2 * _MARGIN + rows * _HEIGHT + (rows - 1) * _GAP_Y
    edges, boxes = [], []
    for run in runs:
        if run.run_id not in at:
            continue
        x, y = _corner(*at[run.run_id])
        for parent in run.parents:
            if parent in at:
                px, py = _corner(*at[parent])
                edges.append(_edge(px + _WIDTH, py + _HEIGHT / 2, x, y + _HEIGHT / 2))
        boxes.append(_box(run, x, y, notes.get(run.run_id, ""), total_train_macs(run, runs)))
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="lineage of the runs">'
    return head + "".join(edges + boxes) + "</svg>"


def _corner(column: int, row: int) -> tuple[float, float]:
    return _MARGIN + column * (_WIDTH + _GAP_X), _MARGIN + row * (_HEIGHT + _GAP_Y)


def _edge(x0: float, y0: float, x1: float, y1: float) -> str:
    middle = (x0 + x1) / 2
    path = f"M{x0},{y0} C{middle},{y0} {middle},{y1} {x1},{y1}"
    return f'<path d="{path}" fill="none" stroke="#adb5bd" stroke-width="1.5"/>'


def _box(run: RunRecord, x: float, y: float, note: str, macs: float) -> str:
    colour = _STAGE_COLOURS.get(run.stage, "#5c636a")
    second = " · ".join(p for p in (run.stage, f"{show_macs(macs)}MACs" if macs else "") if p)
    lines = [(run.name, 20, "font-weight:600"), (second, 38, "fill:#495057"), (note, 55, "fill:#495057")]
    texts = "".join(
        f'<text x="{x + 14}" y="{y + dy}" style="font-size:12px;{style}">{escape(_shortened(text))}</text>'
        for text, dy, style in lines
        if text
    )
    return (
        f"<g><title>{escape(run.name)} ({escape(run.run_id)})</title>"
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#fff" stroke="#ced4da"/>'
        f'<rect x="{x}" y="{y}" width="5" height="{_HEIGHT}" rx="2.5" fill="{colour}"/>{texts}</g>'
    )


def _shortened(text: str, most: int = 30) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
