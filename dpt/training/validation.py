"""Validation during training: its schedule, records, the best weights, and early stopping."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpt import distributed
from dpt.config.recipe import DptConfig
from dpt.models.exporting import export_weights
from dpt.models.weights import Weights
from dpt.training.engine import Engine
from dpt.training.fragments import persistent_buffers, whole_weights


class Validator(Protocol):
    """Scores a network; `dpt.evaluation.validation.Validator` is one. All ranks call it together."""

    metric: str
    """Name of the metric that selects the best weights."""

    def __call__(self, network: nn.Module, alive: Callable[[], None]) -> dict[str, float]:
        """Return all figures by name, equal on all ranks; call `alive` regularly."""
        ...

    def is_better(self, value: float, other: float) -> bool:
        """Whether a value of `metric` is better than another."""
        ...


OpenValidator = Callable[[DptConfig, Mapping[str, str], str], Validator]
"""Makes a validator from the recipe, how targets are coded by task, and what depth's second condition shows."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best validation so far; part of a checkpoint's state."""

    step: int = 0
    value: float = math.nan
    """The validator's metric; NaN before the first validation."""
    misses: int = 0
    """Validations since the best one."""
    stopped: bool = False
    """Whether the run has stopped early for lack of a better one."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Best":
        """The best validation in a checkpoint's state."""
        return cls(**state.get("validation", {}))

    def as_state(self) -> dict[str, Any]:
        """The entry in a checkpoint's state."""
        return asdict(self)

    def after(self, step: int, value: float, validator: Validator, *, patience: int) -> "Best":
        """The best validation after another one. NaN is never the best."""
        better = not math.isnan(value) and (math.isnan(self.value) or validator.is_better(value, self.value))
        if better:
            return Best(step=step, value=value)
        misses = self.misses + 1
        return replace(self, misses=misses, stopped=0 < patience <= misses)


def export_averaged(engine: Engine, config: DptConfig, sections: Mapping[str, Any], out: Path) -> None:
    """Write the first average's weights (the plain ones if the run keeps none) as the folder `out`. Collective.

    A folder that cannot be written is reported, and the run continues.
    """
    state: dict[str, Tensor] = {}
    kind = next(iter(engine.optimizer.ema_decays), "master")
    for name, whole in whole_weights(engine.deepspeed, engine.optimizer, kind):
        if distributed.is_main():
            state[name] = whole.to("cpu", torch.float32, copy=True)
    buffers = persistent_buffers(engine.module)
    if distributed.is_main():
        state |= {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
        try:
            export_weights(Weights(config=config.model, state=state), out, sections=sections)
        except OSError as error:
            distributed.log(f"{out}: the best weights could not be written ({error.strerror or error}).")
