"""Decide whether a run may continue from the checkpoints in its output folder: other recipes are refused, field by field.

Most of a recipe determines the course of training: the network, the objective, the data, the learning rate. Some of it does
not, and may change when a run continues: how many steps it takes, what it records and keeps, where it runs.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpt import distributed
from dpt.config.checks import batch_split, trained_model, trains_with_muon
from dpt.config.recipe import DptConfig, Recipe
from dpt.data.manifest import data_sha256
from dpt.data.sources import resolve
from dpt.errors import UserError
from dpt.tracking.run import flatten
from dpt.training.optimizer import optimizer_options
from dpt.urls import Patience

_COURSE = ("task", "model", "diffusion", "pixel_loss", "data", "training")
"""Sections (and fields) of "dpt" whose fields determine the course, except these:"""
_FREE = frozenset(
    {
        "model.preset",  # only names what the other fields say
        "data.shards",  # compared by their contents
        "data.vae",  # compared with the shards
        "data.num_workers",
        "data.cache_dir",
        "data.verify",
        "data.max_bad_samples",
        "training.output_dir",
        "training.steps",
        "training.ep_size",
        "training.ema_decays",  # a new average begins as the current weights, which is said; the one that teaches is compared
        "training.ema_snapshots",
        "training.ema_snapshot_every",
        "training.activation_checkpointing",
        "training.compile",
        "training.log_every",
        "training.checkpoint_every",
        "training.keep_last",
        "training.expert_distance_every",
        "training.keep_every",
        "training.resume",
        "training.resume_changed",
        "training.max_skipped_steps",
        "training.timeout_s",
        "training.check_memory",
    }
)
_SHOWN = 6


def check_course(checkpoint: Path, state: Mapping[str, Any], recipe: Recipe, stage: str) -> None:
    """Raise UserError if `recipe`, run as `stage`, would take another course than a checkpoint's run with this state.

    Nothing is refused if `dpt.training.resume_changed` is set. Shards with other names are compared by their hashes, if they
    can be read.
    """
    if recipe.dpt.training.resume_changed:
        return
    before, now = _course(state["recipe"], state["layout"]["world_size"], state["stage"], recipe), _of(recipe, stage)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    changed = [f"{name} {before.get(name, 'unset')} -> {now.get(name, 'unset')}" for name in names]
    shards = [list(r["dpt"]["data"]["shards"]) for r in (state["recipe"], recipe.to_dict())]
    if shards[0] != shards[1] and _sha256(shards[1]) != state["sections"]["lineage"]["data_sha256"]:
        changed.append(f"dpt.data.shards {', '.join(shards[0])} -> {', '.join(shards[1])}")
    if not changed:
        return
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    which = ", ".join(changed[:_SHOWN])
    raise UserError(
        f"{recipe.source_of(which)}: {checkpoint} is of a run with another recipe: {which}{more}; choose another "
        "dpt.training.output_dir, or set dpt.training.resume_changed to true to go on all the same."
    )


def check_data(checkpoint: Path, state: Mapping[str, Any], recipe: Recipe, sha256: str) -> None:
    """Raise UserError if the shards, whose names are unchanged, are not those that a checkpoint's run has seen."""
    if state["sections"]["lineage"]["data_sha256"] != sha256 and not recipe.dpt.training.resume_changed:
        raise UserError(
            f"dpt.data.shards are not the ones that the run of {checkpoint} has seen; "
            "choose another dpt.training.output_dir, or set dpt.training.resume_changed to true to go on with these."
        )


def _of(recipe: Recipe, stage: str) -> dict[str, str]:
    """The fields that determine the course of `recipe` as `stage`."""
    trained = replace(recipe, dpt=replace(recipe.dpt, model=trained_model(recipe, stage)))
    return _course(trained.to_dict(), distributed.world_size(), stage, recipe)


def _course(content: Mapping[str, Any], world_size: int, stage: str, like: Recipe) -> dict[str, str]:
    """The fields, by name, that determine the course of a resolved recipe, possibly written by an earlier version."""
    defaults, given = flatten(replace(like, deepspeed={}, dpt=DptConfig()).to_dict()), flatten(content)
    sections = (*_COURSE, "upcycling") if stage == "upcycle" else _COURSE
    course = {"stage": stage}
    for name, default in defaults.items():
        field = name.removeprefix("dpt.")
        if field.split(".")[0] in sections and field not in _FREE:
            course[name] = given.get(name, default)
    if float(course["dpt.training.self_alignment.weight"]):  # 0 stands for the first average, so compare the decay itself
        named = float(course["dpt.training.self_alignment.ema_decay"])
        course["dpt.training.self_alignment.ema_decay"] = str(named or content["dpt"]["training"]["ema_decays"][0])
    if course["dpt.training.weights"]:
        course["dpt.training.weights"] = str(Path(course["dpt.training.weights"]).absolute())
    deepspeed = {key: value for key, value in content.items() if key != "dpt"}
    optimizer = deepspeed.get("optimizer", {})
    options = {"type": "Muon" if trains_with_muon(optimizer) else "AdamW", **optimizer_options(optimizer)}
    for name, value in options.items():
        key = "optimizer.type" if name == "type" else f"optimizer.params.{name}"
        course[key] = str(float(value) if isinstance(value, int) else value)
    course["train_batch_size"] = str(batch_split(replace(like, deepspeed=deepspeed), world_size)[0])
    course["gradient_clipping"] = str(float(deepspeed.get("gradient_clipping", 0.0)))
    return course


def _sha256(shards: list[str]) -> str:
    """Hash of the shards with these names; empty if they cannot be read."""
    try:
        return data_sha256([resolve(source, Patience(retries=0)).manifest for source in shards])
    except UserError:
        return ""
