"""Draws docs/pictures/architecture.svg from the imports: a room's box stands above those of the rooms that it imports.

    python docs/architecture_figure.py

The rooms on the shelf below are used by all above them; no arrows lead there. Arrows that follow from others are left out.
"""

import ast
from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "architecture.svg"
WIDTH, ROW, BOX, MARGIN = 1000, 92, (112, 40), 34
SHELF = ("tracking", "config", "cpu")
"""Folders on the shelf, beside all rooms of one file."""
SAYS = {
    "launchers": "one a stage",
    "data_tools": "offline jobs",
    "commands": "dpt COMMAND",
    "training": "engine, loop",
    "evaluation": "scores, predictions",
    "publishing": "pipelines, cards",
    "scaling": "laws, studies",
    "models": "network, experts",
    "diffusion": "objective, samplers",
    "data": "shards, stream",
    "tracking": "MLflow",
    "config": "the recipe",
    "cpu": "CPU tuning",
}


def rooms() -> dict[str, set[str]]:
    """Each room -> the rooms that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for folder in ("dpt", "data_tools", "launchers"):
        for path in (ROOT / folder).rglob("*.py"):
            room = _room(path.relative_to(ROOT).with_suffix("").parts)
            for name in _imports(path):
                other = _room(tuple(name.split(".")))
                if room and other and other != room:
                    found[room].add(other)
                    found[other]
    return dict(found)


def _room(parts: tuple[str, ...]) -> str:
    if parts[0] in ("data_tools", "launchers"):
        return parts[0]
    is_room = (
        parts[0] == "dpt"
        and len(parts) > 1
        and ((ROOT / "dpt" / parts[1]).is_dir() or (ROOT / "dpt" / f"{parts[1]}.py").exists())
    )
    return {"cli": "commands", "__init__": ""}.get(parts[1], parts[1]) if is_room else ""


def on_shelf(room: str) -> bool:
    """Whether all others use it."""
    return room in SHELF or (ROOT / "dpt" / f"{room}.py").exists()


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def reduced(graph: dict[str, set[str]]) -> dict[str, list[str]]:
    """Without the arrows that follow from others."""

    def reach(room: str) -> set[str]:
        return set().union(*({other} | reach(other) for other in graph[room]))

    return {room: sorted(o for o in others if not any(o in reach(x) for x in others - {o})) for room, others in graph.items()}


def levels(graph: dict[str, set[str]]) -> list[list[str]]:
    """The rooms by their height: the longest way down, the highest first."""
    height: dict[str, int] = {}

    def of(room: str) -> int:
        if room not in height:
            height[room] = 1 + max((of(other) for other in graph[room]), default=-1)
        return height[room]

    top = max(map(of, graph))
    return [sorted(room for room in graph if of(room) == level) for level in range(top, -1, -1)]


def draw(graph: dict[str, set[str]]) -> str:
    """The figure as SVG."""
    shelf = sorted(filter(on_shelf, graph), key=lambda room: (room not in SHELF, room))
    above = {room: {other for other in others if not on_shelf(other)} for room, others in graph.items() if not on_shelf(room)}
    half = (len(shelf) + 1) // 2
    rows, place = [*levels(above), shelf[:half], shelf[half:]], {}
    for number, row in enumerate(rows):
        for index, room in enumerate(row):
            place[room] = (WIDTH * (index + 1) / (len(row) + 1), ROW * number + MARGIN)
    edge = ROW * (len(rows) - 2)
    width, height = BOX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {ROW * len(rows)}" font-family="sans-serif" '
        'font-size="13" text-anchor="middle">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#8a94a0"/></marker></defs><rect width="100%" height="100%" fill="#fff"/>',
        f'<rect x="4" y="{edge - 12}" width="{WIDTH - 8}" height="{2 * ROW}" rx="8" fill="#f7f7f4" stroke="#d8d5c8"/>',
    ]
    for room, others in reduced(above).items():
        for other in others:
            (x1, y1), (x2, y2) = place[room], place[other]
            y1, y2 = y1 + height / 2, y2 - height / 2
            middle = (y1 + y2) / 2
            parts.append(
                f'<path d="M{x1:.0f} {y1:.0f} C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}" fill="none" '
                'stroke="#8a94a0" marker-end="url(#head)"/>'
            )
    for room, (x, y) in place.items():
        says = SAYS.get(room, "")
        parts.append(
            f'<rect x="{x - width / 2:.0f}" y="{y - height / 2:.0f}" width="{width}" height="{height}" rx="6" fill="#eef3f8" '
            f'stroke="#3b6ea5"/><text x="{x:.0f}" y="{y - (2 if says else -4):.0f}" font-weight="bold">{escape(room)}</text>'
        )
        if says:
            parts.append(f'<text x="{x:.0f}" y="{y + 13:.0f}" font-size="10" fill="#444">{escape(says)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(rooms()), encoding="utf-8")
    print(PICTURE)
