"""Plot how far apart the experts of runs are over training steps, and print the first and last distance of each run."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dpt.commands.options import add_run_options, selected_runs
from dpt.errors import UserError
from dpt.tracking.read import RunRecord

METRIC = "experts/distance"
_FORMATS = (".svg", ".png", ".pdf")


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument("--out", type=Path, default=Path("experts.svg"), help="file of the figure")


def run(arguments: argparse.Namespace) -> None:
    from dpt.scaling.plots import WORDS, curves, save

    if arguments.out.suffix not in _FORMATS:
        raise UserError(f"--out {arguments.out}: a figure can be written as {', '.join(_FORMATS)}.")
    records, _ = selected_runs(arguments)
    series = distance_series(records)
    for label, points in series.items():
        (first, start), (last, end) = points[0], points[-1]
        print(f"{label}: {start:.3g} at step {first:.0f}, {end:.3g} at step {last:.0f}")
    figure = curves(series, "optimizer step", WORDS[METRIC])
    axes = figure.axes[0]
    axes.set_ylim(0.0, 1.5)  # 0: copies, 1.41 (the root of 2): unrelated
    axes.axhline(2**0.5, color="#868e96", linewidth=1.0, linestyle=":")
    print(save(figure, arguments.out))


def distance_series(records: Sequence[RunRecord]) -> dict[str, list[tuple[int, float]]]:
    """(step, distance) of every run that recorded it (`dpt.models.expert_distance`), keyed by run label, with the run's id if
    labels repeat. UserError if none has."""
    found = [(record, history) for record in records if (history := record.history(METRIC))]
    if not found:
        raise UserError(
            f"none of these {len(records)} runs has recorded {METRIC}; train with --training.expert_distance_every STEPS."
        )
    times = Counter(record.label for record, _ in found)
    return {
        record.label if times[record.label] == 1 else f"{record.label} ({record.run_id[:8]})": history
        for record, history in found
    }
