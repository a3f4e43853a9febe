"""A run's progress, and the records of it in checkpoints and weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dpt import __version__, distributed
from dpt.training.data_loader import DataLoader
from dpt.training.export import weights_sections
from dpt.training.resume import SkippedSamples
from dpt.training.stages import Stage
from dpt.training.validation import Best

T = TypeVar("T")


@dataclass(kw_only=True)
class RunState:
    """A run's counters, changed by its loop."""

    step: int = 0
    """Optimizer steps, skipped ones included."""
    samples_seen: int = 0
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    skipped_samples: SkippedSamples = field(default_factory=SkippedSamples)
    """Samples that rewinds passed over unseen."""
    best: Best = field(default_factory=Best)
    run_id: str = ""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "RunState":
        """The run state in a checkpoint's state."""
        return cls(
            step=state["step"],
            samples_seen=state["samples_seen"],
            skipped=state["skipped"],
            skipped_in_a_row=state.get("skipped_in_a_row", 0),
            skipped_samples=SkippedSamples.of(state),
            best=Best.of(state),
            run_id=state["run_id"],
        )

    @property
    def position(self) -> int:
        """Stream position of the next sample."""
        return self.samples_seen + self.skipped_samples.count

    def for_checkpoint(self, stage: Stage, sections: Mapping[str, Any]) -> dict[str, Any]:
        """The checkpoint's state beyond the engine's states and its step. `sections`: those of its weights."""
        training = stage.recipe.dpt.training
        return {
            "stage": stage.name,
            "parents": stage.parents,
            "samples_seen": self.samples_seen,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_samples": self.skipped_samples.windows,
            "validation": self.best.as_state(),
            "run_id": self.run_id,
            "layout": {
                "world_size": distributed.world_size(),
                "ep_size": training.ep_size,
                "zero_stage": stage.recipe.zero_stage,
                "precision": stage.recipe.precision,
            },
            "recipe": stage.recipe.to_dict(),
            "sections": sections,
            "dpt_version": __version__,
        }

    def for_weights(self, stage: Stage, loader: DataLoader, macs: int) -> dict[str, Any]:
        """The lineage of the current weights. `macs`: per training sample."""
        task = stage.recipe.dpt.task

        def of_tasks(learnt: Mapping[str, T], shown: Mapping[str, T]) -> dict[str, T]:
            """Entries for all tasks that the weights can predict: a generalist keeps those of tasks not shown now."""
            return {name: value for name, value in {**learnt, **shown}.items() if task in (name, "generalist")}

        lineage = {
            "run_id": self.run_id,
            "parents": stage.parents,
            **({"weights": stage.origin} if stage.origin else {}),
            "train_macs": macs * self.samples_seen,
            "data_sha256": loader.data_sha256,
            "samples_seen": self.samples_seen,
            "step": self.step,
            **({"stopped_early": True} if self.best.stopped else {}),
        }
        return weights_sections(
            stage.recipe.dpt,
            loader.vae,
            lineage,
            codes=of_tasks(stage.codes, loader.codes),
            depth_prompt=loader.depth_prompt,
            class_names=loader.class_names,
            fits=of_tasks(stage.fits, loader.fits),
        )
