"""Look up a run's outputs in its folder without torch: launchers/slurm.sh does so after every job."""

import json
from pathlib import Path
from typing import Any

CHECKPOINTS, AVERAGES, WEIGHTS, BEST = "checkpoints", "averages", "weights", "best"
"""Folders in a run's output folder."""


def has_finished(output_dir: Path, steps: int) -> bool:
    """Whether a run of so many steps has exported its final weights: those of its last step, or of an early stop."""
    weights = output_dir / WEIGHTS
    return exported_step(weights) >= steps or bool(_lineage(weights).get("stopped_early"))


def exported_step(weights: Path) -> int:
    """The training step of exported weights; -1 if there are none, or they do not record it."""
    try:
        return int(_lineage(weights)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def _lineage(weights: Path) -> dict[str, Any]:
    """The training lineage recorded in exported weights; empty if there are none, or they do not record it."""
    try:
        return dict(json.loads((weights / "config.json").read_text(encoding="utf-8"))["lineage"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
