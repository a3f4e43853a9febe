"""A rehearsal of one recipe on gloo ranks: start, checkpoint, resume and export, in processes of its own."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dpt.config.recipe import Recipe, load_recipe
from tests.gloo import run_ranks

_LOADED = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "diffusers.models.autoencoders.autoencoder_kl",
    "dpt.training.loop",
    "dpt.training.preflight",
    "matplotlib.figure",
    "torch._functorch.aot_autograd",
    "torch._inductor.config",
)

STEPS = 2
"""Of each half."""


def load_once() -> None:
    """Load here what the ranks, which are forked, need: it takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        for module in _LOADED:
            importlib.import_module(module)


def join_deepspeed() -> None:
    """In a rank: what `dpt.distributed.init` does after the process group is there, on the CPU whatever else is here."""
    import deepspeed
    import torch
    from deepspeed.ops import __compatible_ops__

    torch.cuda.is_available = lambda: False
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def rehearse(recipe: Recipe, stage: str, ranks: int, fields: Mapping[str, Any], *, compiler: str) -> None:
    """Train `STEPS` steps to a checkpoint and weights, then as many again from there.

    `compiler`: the backend of torch.compile, where the recipe compiles.
    """
    run_ranks(ranks, _halves, recipe.path, stage, dict(fields), compiler, timeout_s=600.0)


def _halves(path: str, stage: str, fields: dict[str, Any], compiler: str) -> None:
    import torch._inductor.config

    from dpt import distributed
    from dpt.models.dit import DiT
    from dpt.training import loop
    from dpt.training.run import run_stage

    join_deepspeed()
    torch._inductor.config.compile_threads = 1  # a forked process makes no pool of others
    distributed.shutdown = lambda: None  # the ranks' groups are needed again
    loop.measure_peak_flops = lambda *_: 1e12
    loop.Watchdog.__init__.__kwdefaults__["interval_s"] = 0.1  # type: ignore[index]
    compile_blocks = DiT.compile_blocks
    DiT.compile_blocks = lambda network: compile_blocks(network, backend=compiler)  # type: ignore[method-assign, assignment]
    for steps in (STEPS, 2 * STEPS):
        run_stage(load_recipe(path, {**fields, "training.steps": steps}), stage)
        torch._dynamo.reset()


def checkpoints(output: Path) -> list[str]:
    """Names of a run's checkpoints, oldest first."""
    return sorted(path.name for path in (output / "checkpoints").iterdir() if path.is_dir())
