"""Choose the checkpoint that a run resumes from, at its start or in a rewind, and the samples it skips from then on.

A rewind restores the last checkpoint after non-finite losses. Batches and noise are functions of a sample's
position in the stream, so they would recur, and so would the failure. The stream therefore continues after the samples
between the checkpoint and the failure (PaLM's authors did so by hand: Chowdhery et al. 2022, section 5.1), which checkpoints
record.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpt import distributed
from dpt.config.checks import trains_with_muon
from dpt.config.recipe import Recipe
from dpt.errors import UserError
from dpt.tracking.run import flatten
from dpt.training.checkpoint import find_checkpoints, kept_averages, newest_checkpoint
from dpt.training.fragments import of_network

Found = tuple[Path, dict[str, Any]]
"""A checkpoint and its state."""


def find_checkpoint(folder: Path, *, resume: bool) -> Found | None:
    """The checkpoint that a starting run resumes from; None if it starts from scratch. Collective.

    UserError if all are damaged, or if there are some and `resume` is false.
    """
    if resume:
        return newest_checkpoint(folder)
    with distributed.shared_errors():
        if distributed.is_main() and find_checkpoints(folder):
            raise UserError(
                f"{folder} holds checkpoints of an earlier run, and dpt.training.resume is false; set it to true, or choose "
                "another dpt.training.output_dir."
            )
    return None


@dataclass(frozen=True, kw_only=True)
class SkippedSamples:
    """Windows [first, end) of stream positions that rewinds skipped, in order and disjoint."""

    windows: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "SkippedSamples":
        """The skipped samples in a checkpoint's state."""
        return cls(windows=tuple((first, end) for first, end in state.get("skipped_samples", ())))

    @property
    def count(self) -> int:
        """Samples in all windows."""
        return sum(end - first for first, end in self.windows)

    def plus(self, first: int, end: int) -> "SkippedSamples":
        """Add one more window, which lies after all others."""
        assert first < end
        assert all(before <= first for _, before in self.windows)
        return SkippedSamples(windows=(*self.windows, (first, end)))

    def begin_at(self, position: int) -> bool:
        """Whether a window begins at `position`, so the run has rewound to that position's checkpoint before."""
        return any(first == position for first, _ in self.windows)

    def __str__(self) -> str:
        return ", ".join(f"{first} to {end - 1}" for first, end in self.windows)


def position_of(state: Mapping[str, Any]) -> int:
    """Stream position at which a checkpoint with this state resumes."""
    return state["samples_seen"] + SkippedSamples.of(state).count


def rewind_target(folder: Path, skipped: SkippedSamples) -> Found | None:
    """The newest undamaged checkpoint from before the non-finite steps; None if there is none. Collective.

    One written between such steps holds the current weights. Also None if the run has gone back to that checkpoint
    before, according to `skipped`.
    """
    found = newest_checkpoint(folder, wanted=lambda state: not state.get("skipped_in_a_row", 0))
    return None if found is None or skipped.begin_at(position_of(found[1])) else found


def check_network(checkpoint: Path, state: Mapping[str, Any], recipe: Recipe, parameters: Mapping[str, list[int]]) -> None:
    """Raise UserError unless a checkpoint with this state is of the network of `recipe`, which has such parameters."""
    written, wanted = ({n: p for n, p in shapes.items() if of_network(n)} for shapes in (state["parameters"], parameters))
    if written != wanted:
        raise UserError(
            f"{checkpoint} is of another network than dpt.model; choose another dpt.training.output_dir, or set "
            "dpt.training.weights to start from it."
        )
    if state["parameters"] != parameters:
        raise UserError(
            f"{checkpoint} was written with other projectors than those of dpt.training.self_alignment and feature_alignment; "
            "set these back, or start another run from its weights (dpt.training.weights)."
        )
    kinds = ["Muon" if trains_with_muon(r.get("optimizer", {})) else "AdamW" for r in (state["recipe"], recipe.deepspeed)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{checkpoint} holds the states of {kinds[0]}, and optimizer.type is {kinds[1]}; set it back, or start another run "
            "from its weights (dpt.training.weights)."
        )
    model, source = recipe.dpt.model, state["recipe"]["dpt"]["model"]
    for name in ("base_width", "base_head_size") if model.base_width else ("base_width",):
        before, now = source.get(name, 0), getattr(model, name)
        if before != now:
            raise UserError(
                f"{checkpoint} was trained with dpt.model.{name} {before}; with {now} the same weights would be another "
                f"function: set it to {before}."
            )


def remarks(checkpoint: Path, state: Mapping[str, Any], recipe: Recipe, data_sha256: str) -> list[str]:
    """Remarks, a sentence each, for when a run of `recipe` on such data resumes from a checkpoint."""
    ranks = state["layout"]["world_size"]
    said = [f"Continuing from {checkpoint} (step {state['step']}, written on {ranks} rank{'s' * (ranks > 1)})."]
    skipped = SkippedSamples.of(state)
    if skipped.windows:
        said.append(f"Samples {skipped} of the stream stay skipped: they led to losses that were not finite.")
    kept = kept_averages(state)
    if new := [str(decay) for decay in recipe.dpt.training.ema_decays if decay > 0 and decay not in kept]:
        said.append(f"It keeps no average of decay {', '.join(new)}, which therefore starts again from the current weights.")
    before, now = flatten(state["recipe"]), flatten(recipe.to_dict())
    shared = sorted(before.keys() & now.keys())
    if changed := [f"{name} {before[name]} -> {now[name]}" for name in shared if before[name] != now[name]]:
        said.append(f"Changed since then: {', '.join(changed)}.")
    if state["sections"]["lineage"]["data_sha256"] != data_sha256:
        said.append("The shards are not the ones of that checkpoint: the order of samples starts over.")
    return said
