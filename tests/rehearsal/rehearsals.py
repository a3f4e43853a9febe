"""A rehearsal of one recipe on gloo ranks: start, checkpoint, resume and export, in processes of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpt.config.recipe import Recipe, load_recipe
from tests.gloo import run_ranks

STEPS = 2
"""Of each half."""


def rehearse(recipe: Recipe, stage: str, ranks: int, fields: Mapping[str, Any], *, compiler: str) -> None:
    """Train `STEPS` steps to a checkpoint and weights, then as many again from there.

    `compiler`: the backend of torch.compile, where the recipe compiles.
    """
    run_ranks(ranks, _halves, recipe.path, stage, dict(fields), compiler, timeout_s=600.0, as_launched=True)


def _halves(path: str, stage: str, fields: dict[str, Any], compiler: str) -> None:
    import torch._inductor.config

    from dpt import distributed
    from dpt.models.dit import DiT
    from dpt.training import records, watchdog
    from dpt.training.run import run_stage

    torch._inductor.config.compile_threads = 1  # a forked process makes no pool of others
    distributed.shutdown = lambda: None  # the ranks' groups are needed again
    records.measure_peak_flops = lambda *_: 1e12
    watchdog.Watchdog.__init__.__kwdefaults__["interval_s"] = 0.1  # type: ignore[index]
    compile_blocks = DiT.compile_blocks
    DiT.compile_blocks = lambda network: compile_blocks(network, backend=compiler)  # type: ignore[method-assign, assignment]
    for steps in (STEPS, 2 * STEPS):
        run_stage(load_recipe(path, {**fields, "training.steps": steps}), stage)


def checkpoints(output: Path) -> list[str]:
    """Names of a run's checkpoints, oldest first."""
    return sorted(path.name for path in (output / "checkpoints").iterdir() if path.is_dir())
