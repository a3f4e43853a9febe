"""The compute of runs, in multiply-accumulates (MACs; two floating-point operations each).

Training: 3 x forward x samples seen (a backward pass costs two forward passes; `dpt.models.costs.macs` leaves out the small
part that needs no gradient). Test time: forward x sampler steps x ensemble members x passes (optical flow predicts u and v in
two passes; classifier-free guidance doubles each step).
"""

import json
from collections.abc import Sequence
from typing import Any

from dpt.config.recipe import section_from_dict
from dpt.config.sections import ModelConfig, UpcyclingConfig
from dpt.errors import UserError
from dpt.tracking.read import RunRecord, ancestors

WEIGHTS_STEP = "study.weights_step"
"""Tag of a run that starts from a kept checkpoint: that checkpoint's step."""
PASSES = {"flow": 2}
"""Sampler passes per prediction, where more than one."""


def prediction_macs(forward_macs: float, *, task: str, steps: int, ensemble: int, guidance_scale: float = 1.0) -> float:
    """MACs of one prediction at test time."""
    return forward_macs * steps * ensemble * PASSES.get(task, 1) * (1 if guidance_scale == 1.0 else 2)


def train_macs(record: RunRecord) -> float:
    """MACs of a run's own training (its metric `compute/train_macs`)."""
    return record.metrics.get("compute/train_macs", 0.0)


def total_train_macs(record: RunRecord, records: Sequence[RunRecord]) -> float:
    """MACs of a run's own training and of all its ancestors, each up to the step whose weights were taken."""
    line = [record, *ancestors(record, records)]
    taken = {parent: int(r.tags[WEIGHTS_STEP]) for r in line if WEIGHTS_STEP in r.tags for parent in r.parents}
    return sum(_macs_until(r, taken[r.run_id]) if r.run_id in taken else train_macs(r) for r in line)


def _macs_until(record: RunRecord, step: int) -> float:
    """MACs of a run's own training up to a step, in proportion between records."""
    before = [(at, macs) for at, macs in record.history("compute/train_macs") if at > 0]
    if not before:
        return train_macs(record)
    at, macs = min(before, key=lambda pair: abs(pair[0] - step))
    return macs * step / at


def section(record: RunRecord, name: str, cls: type) -> Any:
    """A section of a run's recipe as its dataclass, from the run's flat parameters; UserError if it cannot be one."""
    prefix = f"{name}."
    values = {k.removeprefix(prefix): _value(v) for k, v in record.params.items() if k.startswith(prefix)}
    return section_from_dict(cls, values, f"run {record.run_id}") if values else None


def model_config(record: RunRecord) -> ModelConfig | None:
    """The architecture that a run trained (upcycled in the stage "upcycle"); None if its recipe names no valid one."""
    try:
        config: ModelConfig | None = section(record, "model", ModelConfig)
        upcycling: UpcyclingConfig | None = section(record, "upcycling", UpcyclingConfig)
    except UserError:
        return None
    if config is not None and upcycling is not None and record.stage == "upcycle":
        return upcycling.apply(config)
    return config


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
