"""Where a run stands, and what its checkpoints and weights say of it."""

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
    """The counters of a run, which its loop changes."""

    step: int = 0
    """Optimizer steps, skipped ones included."""
    samples_seen: int = 0
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    skipped_samples: SkippedSamples = field(default_factory=SkippedSamples)
    """Those that rewinds passed over; they were not seen."""
    best: Best = field(default_factory=Best)
    run_id: str = ""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "RunState":
        """That of a checkpoint's state."""
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
        """Of the next sample in the stream."""
        return self.samples_seen + self.skipped_samples.count

    def for_checkpoint(self, stage: Stage, sections: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint keeps beside the engine's states and its step. `sections`: what its weights say."""
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
        """What the current weights say of themselves. `macs`: of a sample's training."""
        task = stage.recipe.dpt.task

        def of_tasks(learnt: Mapping[str, T], shown: Mapping[str, T]) -> dict[str, T]:
            """Of all tasks that the weights can predict: a generalist keeps what it is not shown now."""
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
