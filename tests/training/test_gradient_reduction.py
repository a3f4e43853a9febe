"""How gradients of bf16 networks are reduced over ranks: in fp32, during the backward pass, in few collectives."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.train_step import random_batch, recipe
from dpt.config.sections import ModelConfig
from dpt.data.codec import LatentScaling
from dpt.models.costs import num_params
from dpt.training.engine import Engine
from dpt.training.stages import Stage
from dpt.training.step import LossModule, Preparation
from tests.gloo import run_ranks

CONFIG = ModelConfig(hidden_size=32, depth=3, num_heads=2, input_size=8, num_classes=4)
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base")
BUCKET = 40_000
LAYOUTS = ((2, 1), (2, 2), (1, 2))
"""ZeRO stages, and micro-batches of a step."""


def reductions(zero_stage: int, accumulation: int) -> dict[str, list[str]]:
    """The collectives of one step that sum large tensors, as "OPERATION DTYPE", by where they were: backward pass or step."""
    one = recipe(CONFIG, 8 * accumulation, "bf16", zero_stage=zero_stage, accumulation=accumulation)
    one.deepspeed["zero_optimization"]["reduce_bucket_size"] = BUCKET
    engine = Engine(one, LossModule(Stage(name="pretrain", recipe=one).build(), one.dpt))
    prepare = Preparation(one.dpt, tasks=["class"], scaling=LatentScaling(scale=1.0), device=engine.device, dtype=engine.dtype)
    seen: dict[str, list[str]] = {"backward": [], "step": []}
    place = "backward"
    with pytest.MonkeyPatch.context() as patch:
        for name, real in [(name, getattr(dist, name)) for name in REDUCTIONS if hasattr(dist, name)]:

            def recorded(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
                tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
                if tensor.numel() > 1000:
                    seen[place].append(f"{_name} {tensor.dtype}")
                return _real(*args, **kwargs)

            patch.setattr(dist, name, recorded)
        for number in range(accumulation):
            engine.accumulate(*prepare(random_batch(one.dpt, 4)))
            if number < accumulation - 1:
                engine.end_micro_batch()
        place = "step"
        engine.step(1e-4)
    return seen


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, list[str]]]]:
    """Of each rank, in each layout."""
    return run_ranks(2, lambda: [reductions(*layout) for layout in LAYOUTS], as_launched=True)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stage_2_reduces_in_fp32_during_the_backward_pass(ranks: list[list[dict[str, list[str]]]], accumulation: int) -> None:
    """The shipped recipes' stage: one collective a bucket and a rank's part of it, none after the backward pass."""
    for rank in ranks:
        seen = rank[LAYOUTS.index((2, accumulation))]
        assert not seen["step"]
        assert {entry.split()[1] for entry in seen["backward"]} == {"torch.float32"}
        assert len(seen["backward"]) >= 2 * accumulation  # several, so that they overlap with the pass
        assert len(seen["backward"]) <= 2 * accumulation * (1 + num_params(CONFIG).total // (BUCKET // 2))


def test_stage_1_reduces_in_fp32_once_a_step(ranks: list[list[dict[str, list[str]]]]) -> None:
    for rank in ranks:
        seen = rank[LAYOUTS.index((1, 2))]
        assert {entry.split()[1] for entry in seen["backward"] + seen["step"]} == {"torch.float32"}
        assert 0 < len(seen["backward"] + seen["step"]) <= 4
