"""Build an average of any relative length from a run's snapshots after the fact; needs neither DeepSpeed nor ranks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpt.config.sections import LONGEST_EMA
from dpt.errors import UserError
from dpt.training.averages import Profile, exponent, mix
from dpt.training.checkpoint import CheckpointReader, DamagedCheckpoint, check_file, find_checkpoints, kept_lengths, read_state
from dpt.training.fragments import of_network
from dpt.training.outputs import AVERAGES

_WORST = 0.1
"""Largest residual at which a profile still counts as an average of that length."""


def rebuild(checkpoint: Path, length: float) -> tuple[dict[str, Tensor], float]:
    """The parameters of a whole checkpoint averaged with the relative length `length`, float32, and the profile's residual.

    Built from its own power-function averages and the snapshots of its run (the folder beside the checkpoints') up to its step,
    weighted by `dpt.training.averages.mix`. Holds one parameter of two snapshots at a time. UserError if there are no such
    averages, one is damaged, or their residual for that length is above a tenth.
    """
    if not 0.0 < length <= LONGEST_EMA:
        raise UserError(f"--ema-length {length} must be above 0 and at most {LONGEST_EMA}, as a share of the run.")
    averages = _averages(checkpoint)
    _, state = averages[0]
    found = [
        (reader, name, Profile(exponent(kept), taken["engine"]["updates"]))
        for reader, taken in averages
        for kept, name in kept_lengths(taken).items()
    ]
    made = mix([profile for *_, profile in found], Profile(exponent(length), state["engine"]["updates"]))
    if made.residual > _WORST:
        raise UserError(
            f"{checkpoint}: its {len(averages) - 1} snapshots of the lengths {sorted(kept_lengths(state))} come no nearer than "
            f"{made.residual:.0%} to the length {length}; choose a nearer one, or keep more (dpt.training.ema_snapshots)."
        )
    sums = {}
    for parameter, shape in state["parameters"].items():
        if of_network(parameter):
            total = torch.zeros(shape, dtype=torch.float64)
            for (reader, name, _), share in zip(found, made.shares, strict=True):
                total.add_(reader.whole(name, parameter, shape).double(), alpha=share)
            sums[parameter] = total.float()
    return sums, made.residual


def _averages(checkpoint: Path) -> list[tuple[CheckpointReader, dict[str, Any]]]:
    """The checkpoint and the snapshots before it, undamaged, each with its state."""
    state = read_state(checkpoint)
    if not kept_lengths(state) or not state["engine"]["updates"]:
        raise UserError(
            f"{checkpoint} keeps no power-function averages; set dpt.training.ema_lengths, such as [0.05, 0.1], before a run."
        )
    found = [(CheckpointReader(checkpoint, state), state)]
    try:
        for folder in find_checkpoints(checkpoint.parent.parent / AVERAGES):
            snapshot = read_state(folder)
            if snapshot["step"] < state["step"]:
                for name, entry in snapshot["files"].items():
                    check_file(folder / name, entry)
                found.append((CheckpointReader(folder, snapshot), snapshot))
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; remove {folder} to do without it.") from error
    return found
