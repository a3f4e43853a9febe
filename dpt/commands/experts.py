"""Plot how far the experts of runs are apart over training steps, and print the first and last distance of each run."""

import argparse
from pathlib import Path

from dpt.commands.options import add_run_options, selected_runs
from dpt.errors import UserError

_FORMATS = (".svg", ".png", ".pdf")


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument("--out", type=Path, default=Path("experts.svg"), help="file of the figure")


def run(arguments: argparse.Namespace) -> None:
    from dpt.scaling.expert_distance import distance_figure, distance_series
    from dpt.scaling.plots import save

    if arguments.out.suffix not in _FORMATS:
        raise UserError(f"--out {arguments.out}: a figure can be written as {', '.join(_FORMATS)}.")
    records, _ = selected_runs(arguments)
    for label, series in distance_series(records).items():
        (first, start), (last, end) = series[0], series[-1]
        print(f"{label}: {start:.3g} at step {first:.0f}, {end:.3g} at step {last:.0f}")
    print(save(distance_figure(records), arguments.out))
