"""What a run leaves in its output folder, looked up without torch: launchers/slurm.sh does so after every job."""

import json
from pathlib import Path

CHECKPOINTS, AVERAGES, WEIGHTS = "checkpoints", "averages", "weights"
"""Folders in a run's output folder."""


def exported_step(weights: Path) -> int:
    """The training step of exported weights; -1 if there are none, or they do not say."""
    try:
        return int(json.loads((weights / "config.json").read_text(encoding="utf-8"))["lineage"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1
