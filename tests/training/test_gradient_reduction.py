"""How gradients of bf16 networks are reduced over ranks: in fp32, during the backward pass, in few collectives."""

import importlib
import os
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from benchmarks.train_step import random_batch, recipe
from dpt.config.sections import ModelConfig
from tests.gloo import run_ranks

CONFIG = ModelConfig(hidden_size=32, depth=3, num_heads=2, input_size=8, num_classes=4)
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base")


@pytest.fixture(scope="module", autouse=True)
def deepspeed_loaded():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    importlib.import_module("deepspeed")  # once, here: the ranks are forked


def reductions(zero_stage: int, accumulation: int, bucket: int) -> dict[str, list[str]]:
    """The collectives of one step that sum large tensors, as "OPERATION DTYPE", by where they were: backward pass or step."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    from dpt.data.codec import LatentScaling
    from dpt.training.engine import Engine
    from dpt.training.stages import Stage
    from dpt.training.step import LossModule, Preparation

    __compatible_ops__["deepspeed_shm_comm"] = False  # no compiler needed
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)  # takes up the group that exists
    one = recipe(CONFIG, 8 * accumulation, "bf16", zero_stage=zero_stage, accumulation=accumulation)
    one.deepspeed["zero_optimization"]["reduce_bucket_size"] = bucket
    engine = Engine(one, LossModule(Stage(name="pretrain", recipe=one).build(), one.dpt))
    prepare = Preparation(one.dpt, tasks=["class"], scaling=LatentScaling(scale=1.0), device=engine.device, dtype=engine.dtype)
    place, seen = "backward", {"backward": [], "step": []}
    for name in REDUCTIONS:
        real = getattr(dist, name, None)
        if real is None:
            continue

        def recorded(*args, _real=real, _name=name, **kwargs):
            tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
            if tensor.numel() > 1000:
                seen[place].append(f"{_name} {tensor.dtype}")
            return _real(*args, **kwargs)

        setattr(dist, name, recorded)
    for number in range(accumulation):
        engine.accumulate(*prepare(random_batch(CONFIG, 4)))
        if number < accumulation - 1:
            engine.end_micro_batch()
    place = "step"
    engine.step(1e-4)
    return seen


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stage_2_reduces_in_fp32_during_the_backward_pass(accumulation):
    """The shipped recipes' stage: one collective a bucket and a rank's part of it, none after the backward pass."""
    bucket = 40_000
    for seen in run_ranks(2, reductions, 2, accumulation, bucket):
        assert not seen["step"]
        assert {entry.split()[1] for entry in seen["backward"]} == {"torch.float32"}
        assert len(seen["backward"]) >= 2 * accumulation  # several, so that they overlap with the pass
        assert len(seen["backward"]) <= 2 * accumulation * (1 + _parameters() // (bucket // 2))


def test_stage_1_reduces_in_fp32_once_a_step():
    for seen in run_ranks(2, reductions, 1, 2, 40_000):
        assert {entry.split()[1] for entry in seen["backward"] + seen["step"]} == {"torch.float32"}
        assert Counter(seen["backward"] + seen["step"]).total() <= 4


def _parameters() -> int:
    from dpt.models.costs import num_params

    return num_params(CONFIG).total
