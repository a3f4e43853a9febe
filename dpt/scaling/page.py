"""Building blocks of HTML pages: one file, no network, no script but the sliders' own line."""

import base64
import io
import mimetypes
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dpt.scaling import plots
from dpt.scores import readable, round_ticks

_STYLE = Path(__file__).parents[1] / "assets" / "report.css"

_PLAIN_BYTES = 100_000  # smaller picture files are embedded as they are
_LONGEST = 1100  # pixels

Section = tuple[str, str, str]
"""Anchor, title, content."""


def write_page(out: Path, text: str) -> Path:
    """Write a page at once or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(out)
    return out


def page(title: str, head: str, sections: Sequence[Section]) -> str:
    """A whole page; `head` goes between the title and the links; empty sections are left out."""
    shown = [s for s in sections if s[2]]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in shown)
    body = "".join(f'<section id="{anchor}"><h2>{escape(name)}</h2>{content}</section>' for anchor, name, content in shown)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{head}<nav>{links}</nav>{body}</main></body></html>\n"
    )


def table(header: Sequence[str], cells: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """A table; `kinds` gives each row its class ("best", "base", "ours" or ""). On narrow screens each row becomes a card whose
    values stand beside their column's name."""
    head = "".join(
        f"<th>{escape(h).replace(' ↓', '&nbsp;↓').replace(' ↑', '&nbsp;↑').replace(' = ', ' =&nbsp;')}</th>" for h in header
    )
    body = ""
    for number, row in enumerate(cells):
        kind = f' class="{kinds[number]}"' if number < len(kinds) and kinds[number] else ""
        named = zip(header, row, strict=True)
        body += f"<tr{kind}>" + "".join(f'<td data-name="{escape(h, quote=True)}">{escape(c)}</td>' for h, c in named) + "</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def card(title: str, value: str, note: str = "") -> str:
    """A card with one key figure."""
    small = '<span class="soft small">'
    return f'<div class="card">{small}{escape(title)}</span><b>{escape(value)}</b>{small}{escape(note)}</span></div>'


def bars(rows: Sequence[tuple[str, float, str, str]], axis: str) -> str:
    """Horizontal bars under the name of their axis; each row is (label, length, shown value, kind as in `table`)."""
    longest = max((length for _, length, _, _ in rows), default=0.0) or 1.0
    lines = ""
    for label, length, shown, kind in rows:
        width = f"width:{100 * max(length, 0.0) / longest:.1f}%"
        lines += f'<div class="bar {kind}"><span>{escape(label)}</span><div><i style="{width}"></i></div>'
        lines += f"<b>{escape(shown)}</b></div>"
    return f'<div class="bars"><div class="soft small">{escape(axis)}</div>{lines}</div>'


def chart(figure: Any, caption: str) -> str:
    """A matplotlib figure, embedded; the figure is closed."""
    return _embedded("image/svg+xml", plots.to_svg(figure).encode(), caption)


def picture(path: Path, caption: str) -> str:
    """A picture file, embedded; large ones are scaled down and compressed."""
    return _embedded(*_encoded(path), caption)


def _encoded(path: Path) -> tuple[str, bytes]:
    """Media type and bytes of a picture as it is embedded."""
    from PIL import Image

    data = path.read_bytes()
    if len(data) <= _PLAIN_BYTES:
        return mimetypes.guess_type(path)[0] or "image/png", data
    with Image.open(path) as image:
        shown = image.convert("RGB")
    shown.thumbnail((_LONGEST, 4 * _LONGEST))
    buffer = io.BytesIO()
    shown.save(buffer, "webp", quality=85)
    return "image/webp", buffer.getvalue()


def _source(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _embedded(kind: str, data: bytes, caption: str) -> str:
    name = escape(caption, quote=True)
    return f'<figure><img loading="lazy" alt="{name}" src="{_source(kind, data)}"><figcaption>{name}</figcaption></figure>'


def slider(below: Path, above: Path, names: tuple[str, str], caption: str) -> str:
    """Two pictures of one size, the second over the first to the right of a line moved by finger, mouse or key."""
    first, second = (escape(name, quote=True) for name in names)
    sources = [_source(*_encoded(path)) for path in (below, above)]
    move = "this.parentNode.style.setProperty('--at',this.value+'%')"
    return (
        f'<figure><div class="slide"><img alt="{first}" src="{sources[0]}"><img class="over" alt="{second}" src="{sources[1]}">'
        f'<input type="range" min="0" max="100" value="50" aria-label="{first} or {second}" oninput="{move}">'
        f"</div><figcaption>{escape(caption)}</figcaption></figure>"
    )


def colour_bar(colours: str, low: float, high: float, unit: str, title: str) -> str:
    """A legend of matplotlib's colour map `colours` from `low` to `high`, with round ticks and the unit."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    stops = ", ".join(to_hex(colormaps[colours](i / 16)) for i in range(17))
    ticks = "".join(
        f'<span style="left:{100 * (t - low) / max(high - low, 1e-9):.1f}%">{readable(t)}</span>'
        for t in round_ticks(low, high)
    )
    return (
        f'<div class="scale"><span class="soft small">{escape(title)}, {escape(unit)}</span>'
        f'<div style="background:linear-gradient(90deg, {stops})"></div><p>{ticks}</p></div>'
    )


def legend(path: Path, words: str) -> str:
    """A small picture that explains colours, and its words."""
    image = f'<img alt="" src="{_source(*_encoded(path))}">'
    return f'<div class="legend">{image}<span class="soft small">{escape(words)}</span></div>'


def grid(figures: Sequence[str], kind: str = "") -> str:
    """Figures side by side where there is room; `kind` "trio": three large ones, "scenes": as many as fit."""
    return f'<div class="grid {kind}">{"".join(figures)}</div>' if figures else ""
