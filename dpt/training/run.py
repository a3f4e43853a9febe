"""One command of training, from a recipe to exported weights: what the launchers call."""

import os
import sys

from dpt import distributed
from dpt.config.recipe import Recipe


def run_stage(recipe: Recipe, stage: str) -> None:
    """Train `recipe` as `stage` ("pretrain", "finetune" or "upcycle"). UserError for bad input; exits 1 when training fails."""
    distributed.set_environment()
    from dpt.training.preflight import preflight

    needs = preflight(recipe, stage, int(os.environ["WORLD_SIZE"]))
    distributed.init(recipe.dpt.training.timeout_s)
    distributed.log(needs.plan)
    from dpt.training.failure import TrainingFailed
    from dpt.training.loop import train

    try:
        train(recipe, stage)
    except TrainingFailed as error:
        distributed.log(f"{stage}: failed: {error}")
        distributed.shutdown()
        sys.exit(1)
    distributed.shutdown()
