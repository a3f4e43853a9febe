"""A plan as recipes and a study that runs them, derived from the recipes of the runs that the plan was learned from."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpt.errors import UserError
from dpt.scaling.planner import Plan
from dpt.tracking.read import RunRecord, ancestors

_OF_STAGES = ("num_conditions", "num_classes", "class_dropout_prob", "learn_sigma", "patch_embed_tasks", "clip_embedding_size")
"""Model fields in which the stages of one model may differ; all others come from the plan."""


def write_plan(
    plan: Plan, example: RunRecord, family: Sequence[RunRecord], folder: Path, *, experiment: str, seeds: int = 1
) -> Path:
    """Write the recipes of every stage and `study.yaml`, which runs them with `seeds` seeds, to `folder`; returns the study.

    Recipes come from the evaluation `example` and its ancestors or, for a stage that these lack, from the newest run in
    `family` (sorted, oldest first). Raises UserError if there is none.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    samples = {"pretrain": plan.pretrain_samples, "finetune": plan.finetune_samples, "upcycle": plan.upcycle_samples}
    stages: dict[str, dict[str, Any]] = {}
    before = ""
    examples = [example, *ancestors(example, family), *reversed(family)]
    for stage in ("pretrain", "finetune", "upcycle", "evaluate"):
        if samples.get(stage, 1) <= 0:
            continue
        recipe = _template(examples, stage)
        if stage == "evaluate":
            recipe["dpt"]["evaluation"] |= {"steps": [plan.setting.steps], "ensemble": [plan.setting.ensemble]}
        else:
            _set_training(recipe, plan, samples[stage])
            if stage == "upcycle":
                recipe["dpt"]["upcycling"] = dataclasses.asdict(plan.upcycling)
        path = folder / f"{stage}.json"
        path.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        stages[stage] = {"launcher": stage, "recipe": str(path), "axes": ["seed"]} | ({"weights": before} if before else {})
        before = stage
    study = {
        "title": f"Plan: {plan.train_macs:.3g} MACs of training",
        "output": str(folder / "runs"),
        "experiment": experiment,
        "axes": {
            "seed": {
                "stages": [stage for stage in stages if stage != "evaluate"],
                "values": {f"s{seed}": {"training.seed": seed} for seed in range(seeds)},
            }
        },
        "stages": stages,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def _template(examples: Sequence[RunRecord], stage: str) -> dict[str, Any]:
    """The recipe of a stage's first run that has kept one."""
    for record in examples:
        if record.stage == stage:
            recipe = copy.deepcopy(record.recipe())
            if "dpt" in recipe:
                recipe["dpt"].pop("tracking", None)
                return recipe
    raise UserError(f"no run of the stage {stage} has kept its recipe; the plan's own cannot be made from one.")


def _set_training(recipe: dict[str, Any], plan: Plan, samples: float) -> None:
    """Set the plan's model and length; checkpoints keep their frequency relative to the run."""
    batch = int(recipe.get("train_batch_size", 1))
    training = recipe["dpt"]["training"]
    steps = max(1, round(samples / batch))
    scale = steps / max(1, training["steps"])
    for name in ("checkpoint_every", "warmup_steps"):
        training[name] = max(1, round(training[name] * scale)) if training[name] else 0
    training["steps"] = steps
    training["weights"] = ""  # the study provides those of the previous stage
    recipe["dpt"]["model"] |= {k: v for k, v in dataclasses.asdict(plan.config).items() if k not in _OF_STAGES}
