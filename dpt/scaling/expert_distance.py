"""How different the experts of runs are, over their steps (`dpt.models.expert_distance`), as a figure."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dpt.errors import UserError
from dpt.scaling.plots import WORDS, curves
from dpt.tracking.read import RunRecord

METRIC = "experts/distance"


def distance_series(records: Sequence[RunRecord]) -> dict[str, list[tuple[float, float]]]:
    """(step, distance) of every run that has recorded it, by its label, with the run's id where labels are the same.

    UserError if none has.
    """
    found = [(record, history) for record in records if (history := record.history(METRIC))]
    if not found:
        raise UserError(
            f"none of these {len(records)} runs has recorded {METRIC}; train with --training.expert_distance_every STEPS."
        )
    times = Counter(record.label for record, _ in found)
    return {
        record.label if times[record.label] == 1 else f"{record.label} ({record.run_id[:8]})": [
            (float(s), v) for s, v in history
        ]
        for record, history in found
    }


def distance_figure(records: Sequence[RunRecord]) -> Any:
    """A line a run: 0 are copies, 1.41 (the root of 2) strangers. UserError as `distance_series`."""
    figure = curves(distance_series(records), "optimizer step", WORDS[METRIC])
    axes = figure.axes[0]
    axes.set_ylim(0.0, 1.5)
    axes.axhline(2**0.5, color="#868e96", linewidth=1.0, linestyle=":")
    return figure
