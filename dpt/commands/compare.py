"""Compare runs: recipe fields that differ, metrics, compute, cost and ancestors, as a table, CSV, or a page with curves."""

import argparse
from pathlib import Path

from dpt.commands.options import add_run_options, selected_runs
from dpt.config.numbers import NOT_NEGATIVE, numeric
from dpt.errors import UserError
from dpt.scaling.compare import as_csv, as_html, as_text, compare
from dpt.scaling.page import write_page

_FORMATS = (".csv", ".html", ".txt")


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    add = parser.add_argument
    add("--metrics", nargs="+", default=[], metavar="NAME", help="further metrics (last and least value)")
    add("--price", type=numeric(float, NOT_NEGATIVE), default=0.0, help="price of a device-hour: adds a row of costs")
    add("--out", type=Path, help=f"write a file instead of printing; its suffix is the format: {', '.join(_FORMATS)}")


def run(arguments: argparse.Namespace) -> None:
    out: Path | None = arguments.out
    if out is not None and out.suffix not in _FORMATS:
        raise UserError(f"--out {out}: a comparison can be written as {', '.join(_FORMATS)}.")
    records, family = selected_runs(arguments)
    comparison = compare(records, family, metrics=arguments.metrics, price=arguments.price)
    if out is None:
        print(as_text(comparison))
        return
    texts = {".csv": as_csv, ".txt": as_text, ".html": lambda c: as_html(c, family)}
    print(write_page(out, texts[out.suffix](comparison)))
