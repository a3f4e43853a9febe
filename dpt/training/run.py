"""Run one training command, from a recipe to exported weights; the launchers call it."""

import os
import sys
from typing import TYPE_CHECKING

from dpt import distributed
from dpt.config.checks import split_note
from dpt.config.recipe import Recipe
from dpt.errors import UserError

if TYPE_CHECKING:
    from dpt.training.validation import OpenValidator


def run_stage(recipe: Recipe, stage: str, *, open_validator: "OpenValidator | None" = None) -> None:
    """Train `recipe` as `stage` ("pretrain", "finetune" or "upcycle"). UserError for bad input; exits 1 when training fails.

    `open_validator`: makes the scorer of networks for `dpt.validation`.
    """
    with recipe.blamed():
        distributed.set_environment()
        distributed.set_device()
        from dpt.training.preflight import available, check_memory, check_ranks

        ranks = int(os.environ["WORLD_SIZE"])
        required, free = check_ranks(recipe, stage, ranks), available()
        distributed.init(recipe.dpt.training.timeout_s)
        try:
            check_memory(recipe, stage, required, free)
        except UserError:  # on all ranks together
            distributed.shutdown()
            raise
        distributed.log(required.plan)
        if note := split_note(recipe, ranks):
            distributed.log(note)
        from dpt.training.failure import TrainingFailed
        from dpt.training.loop import train

        try:
            train(recipe, stage, open_validator)
        except TrainingFailed as error:
            distributed.log(f"{stage}: failed: {error}")
            distributed.shutdown()
            sys.exit(1)
        distributed.shutdown()
