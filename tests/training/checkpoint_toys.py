"""Checkpoints of an "engine" that is just a number."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpt.config.recipe import Recipe
from dpt.training import saving
from dpt.training.saving import Saver


def make_saver(folder: Path, monkeypatch: pytest.MonkeyPatch | None = None, size: int = 1000, **kept: int) -> Saver:
    """A Saver of an "engine" that is just a number, the step."""

    def snapshot(engine: Any, states: None) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
        return {"master/w": torch.full((size,), float(engine.number))}, {"w": [0, size]}

    patches = {
        "snapshot": snapshot,
        "engine_state": lambda engine: {"updates": engine.number, "loss_scaler": {}},
        "parameter_shapes": lambda module: {"w": [size]},
    }
    for name, value in patches.items():
        if monkeypatch is None:
            setattr(saving, name, value)  # in a process of its own
        else:
            monkeypatch.setattr(saving, name, value)
    return Saver(folder, keep_last=kept.get("keep_last", 2), keep_every=kept.get("keep_every", 0))


def number_engine(number: int) -> Any:
    optimizer = SimpleNamespace(state_names=list, ema_decays={}, ema_lengths={})
    return SimpleNamespace(number=number, module=None, optimizer=optimizer)


def save(saver: Saver, step: int, **state: Any) -> bool:
    """Whether the checkpoint of `step` could be written; `state`: what it says beside."""
    saver.begin(number_engine(step), step, {"note": "kept", **state})
    return saver.finish()


def state_of(recipe: Recipe, data_sha256: str = "a", **more: Any) -> dict[str, Any]:
    """What a checkpoint of a run of this recipe on two ranks says, but for its step."""
    sections = {"lineage": {"data_sha256": data_sha256}}
    state = {"stage": "pretrain", "samples_seen": 32, "layout": {"world_size": 2}, "sections": sections}
    return state | {"recipe": recipe.to_dict(), **more}
