"""What must hold between the sections of a recipe and the machine, checked before any work starts (no torch)."""

from typing import NoReturn

from dpt.config.recipe import Recipe
from dpt.config.sections import ModelConfig
from dpt.errors import UserError

CONDITIONS = {"class": (0, 0), "depth": (1, 2), "flow": (2, 2), "amodal": (2, 2), "generalist": (2, 2)}
"""Least and most condition latents (`model.num_conditions`) of each task."""


def trained_model(recipe: Recipe, stage: str) -> ModelConfig:
    """The architecture that a stage trains: the recipe's, upcycled in the stage "upcycle"."""
    return recipe.dpt.upcycling.apply(recipe.dpt.model) if stage == "upcycle" else recipe.dpt.model


def check_recipe(recipe: Recipe, world_size: int, stage: str = "pretrain") -> None:
    """Raise a UserError naming the key, its value and a mend if the recipe cannot run as `stage` on `world_size` ranks."""
    _check_batch(recipe, world_size)
    _check_experts(recipe, world_size, trained_model(recipe, stage).num_experts)
    _check_task(recipe)
    if all(recipe.deepspeed.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")):
        _refuse(recipe, "bf16.enabled and fp16.enabled are both true; enable one.")
    optimizer = recipe.deepspeed.get("optimizer", {}).get("type", "AdamW")
    if optimizer.lower() not in ("adam", "adamw"):
        _refuse(recipe, f'optimizer.type is "{optimizer}"; the optimizer here is AdamW (it carries the averaged weights).')


def batch_split(recipe: Recipe, world_size: int) -> tuple[int, int, int]:
    """(train_batch_size, micro batch per rank, accumulation steps), whichever of the three are given, in DeepSpeed's manner."""
    given = recipe.deepspeed
    total = given.get("train_batch_size")
    micro = given.get("train_micro_batch_size_per_gpu")
    accumulation = given.get("gradient_accumulation_steps")
    if total is None:
        if micro is None:
            _refuse(recipe, "train_batch_size is missing; give the global batch size.")
        return micro * (accumulation or 1) * world_size, micro, accumulation or 1
    if micro is None:
        micro = total // (world_size * (accumulation or 1))
    if accumulation is None:
        accumulation = total // (world_size * micro) if micro else 0
    if micro * accumulation * world_size != total:
        _refuse(
            recipe,
            f"train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{accumulation} x {world_size} ranks; change one of them.",
        )
    return total, micro, accumulation


def _check_batch(recipe: Recipe, world_size: int) -> None:
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = recipe.deepspeed.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            _refuse(recipe, f"{key} is {value!r}; it must be a whole number of at least 1.")
    batch_split(recipe, world_size)


def _check_experts(recipe: Recipe, world_size: int, experts: int) -> None:
    ep_size, stage = recipe.dpt.training.ep_size, recipe.zero_stage
    if stage not in (0, 1, 2, 3):
        _refuse(recipe, f"zero_optimization.stage is {stage}; it must be 0, 1, 2 or 3.")
    if ep_size > 1 and experts == 0:
        _refuse(recipe, f"dpt.training.ep_size is {ep_size}, but the model is dense; set it to 1.")
    if world_size % ep_size:
        _refuse(recipe, f"dpt.training.ep_size {ep_size} does not divide the {world_size} ranks; choose a divisor.")
    if recipe.deepspeed.get("use_data_before_expert_parallelism", False):
        _refuse(
            recipe,
            "use_data_before_expert_parallelism is set; here the ranks that share a layer's experts are neighbours (they "
            "exchange tokens in every layer), so remove it.",
        )
    if experts % ep_size:
        _refuse(recipe, f"dpt.training.ep_size {ep_size} does not divide dpt.model.num_experts {experts}; choose a divisor.")


def _check_task(recipe: Recipe) -> None:
    config = recipe.dpt
    least, most = CONDITIONS[config.task]
    if not least <= config.model.num_conditions <= most:
        span = str(least) if least == most else f"{least} or {most}"
        _refuse(
            recipe,
            f'dpt.model.num_conditions is {config.model.num_conditions}; task "{config.task}" has {span} condition latents.',
        )
    if config.task != "class" and config.data.horizontal_flip:
        _refuse(recipe, "dpt.data.horizontal_flip is for class images; perception shards are mirrored while encoding.")


def _refuse(recipe: Recipe, sentence: str) -> NoReturn:
    raise UserError(f"{recipe.path or 'the command line'}: {sentence}")
