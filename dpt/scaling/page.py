"""The parts that HTML pages are put together from: one file, no network, no script."""

import base64
import io
import mimetypes
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dpt.scaling import plots

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
    """A whole page; `head` is what stands between the title and the links; empty sections are left out."""
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
    """A table; `kinds` gives each row its class ("best", "base", "ours" or "")."""
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = ""
    for number, row in enumerate(cells):
        kind = f' class="{kinds[number]}"' if number < len(kinds) and kinds[number] else ""
        body += f"<tr{kind}>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def card(title: str, value: str, note: str = "") -> str:
    """One figure that matters."""
    small = '<span class="soft small">'
    return f'<div class="card">{small}{escape(title)}</span><b>{escape(value)}</b>{small}{escape(note)}</span></div>'


def chart(figure: Any, caption: str) -> str:
    """A matplotlib figure, embedded; the figure is closed."""
    return _embedded("image/svg+xml", plots.to_svg(figure).encode(), caption)


def picture(path: Path, caption: str) -> str:
    """A picture file, embedded; large ones are scaled down and compressed."""
    from PIL import Image

    data = path.read_bytes()
    if len(data) <= _PLAIN_BYTES:
        return _embedded(mimetypes.guess_type(path)[0] or "image/png", data, caption)
    with Image.open(path) as image:
        shown = image.convert("RGB")
    shown.thumbnail((_LONGEST, 4 * _LONGEST))
    buffer = io.BytesIO()
    shown.save(buffer, "webp", quality=85)
    return _embedded("image/webp", buffer.getvalue(), caption)


def _embedded(kind: str, data: bytes, caption: str) -> str:
    name = escape(caption, quote=True)
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img loading="lazy" alt="{name}" src="{source}"><figcaption>{name}</figcaption></figure>'


def grid(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""
