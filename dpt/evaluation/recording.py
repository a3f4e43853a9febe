"""Record evaluations as MLflow runs, below the run that trained the weights."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpt import distributed, hub
from dpt.config.recipe import Recipe
from dpt.config.sections import DataConfig
from dpt.data.shards import ShardFolder
from dpt.evaluation.prediction import Predictor
from dpt.models.attention import use_backend
from dpt.models.weights import Weights
from dpt.tracking import Run


def open_predictor(
    recipe: Recipe, *, ready_made: bool, vae: str = "", read: Callable[..., Weights]
) -> tuple[Recipe, Predictor | None]:
    """Return the recipe, its weights pinned to a commit, and their predictor: None if `ready_made` results are scored.

    `vae` (empty: the recipe's, or, if that is the default, the one that the weights name) and `read` as in
    `dpt.evaluation.loading.load_model`.
    """
    config = recipe.dpt.evaluation
    config = replace(config, weights=hub.pinned(config.weights))
    recipe = replace(recipe, dpt=replace(recipe.dpt, evaluation=config))
    distributed.log(use_backend(recipe.dpt.attention_backend))
    if ready_made or not config.weights:
        return recipe, None
    vae = vae or (recipe.dpt.data.vae if recipe.dpt.data.vae != DataConfig().vae else "")
    with distributed.shared_errors():
        return recipe, Predictor(config.weights, config=config, vae=vae, read=read)


class Recording(contextlib.ExitStack):
    """MLflow record of an evaluation. `begin` starts it once all input has been checked, so that bad input leaves no
    failed run."""

    run: Run

    def __init__(self, recipe: Recipe, predictor: Predictor | None, *, name: str) -> None:
        super().__init__()
        self._recipe, self._predictor, self._name = recipe, predictor, name

    def begin(self, task: str) -> None:
        """Start the run. Its parameters are the recipe's, with the task, network and objective of the weights, by which runs
        are found."""
        from dpt.tracking import start_run

        parent = ""
        changes: dict[str, Any] = {"task": task}
        if self._predictor is not None:
            parent = str(self._predictor.lineage.get("run_id") or "")
            changes |= {"model": self._predictor.model, "diffusion": self._predictor.diffusion}
        recipe = replace(self._recipe, dpt=replace(self._recipe.dpt, **changes))
        with distributed.shared_errors():
            started = start_run(
                recipe.dpt.tracking,
                stage="evaluate",
                name=self._name,
                params=recipe.to_dict(),
                parents=[parent],
                output_dir=Path(recipe.dpt.evaluation.output_dir),
                tags={},
            )
        self.run = self.enter_context(started)


def shards_as_dataset(folder: str, cache_dir: str) -> dict[str, Any]:
    """Arguments of `Run.log_dataset` for a shard folder that an evaluation reads."""
    manifest = ShardFolder(folder, cache_dir=cache_dir).manifest
    return {
        "name": f"{manifest.dataset}/{manifest.split}",
        "digest": manifest.data_sha256,
        "source": folder,
        "context": "evaluation",
        "profile": manifest.profile,
    }
