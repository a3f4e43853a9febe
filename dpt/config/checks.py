"""Constraints between the sections of a recipe and the machine, checked before any work starts (no torch)."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, get_args

from dpt.config.recipe import Recipe
from dpt.config.sections import CONDITIONS, ModelConfig, Task
from dpt.errors import UserError


def trained_model(recipe: Recipe, stage: str) -> ModelConfig:
    """The architecture that a stage trains: the recipe's, upcycled in the stage "upcycle"."""
    return recipe.dpt.upcycling.apply(recipe.dpt.model) if stage == "upcycle" else recipe.dpt.model


def check_recipe(recipe: Recipe, world_size: int, stage: str = "pretrain") -> None:
    """Raise a UserError naming the key, its value and a fix if the recipe cannot run as `stage` on `world_size` ranks."""
    batch_split(recipe, world_size)
    if problem := next(_problems(recipe, world_size, trained_model(recipe, stage)), ""):
        _refuse(recipe, problem)


def _problems(recipe: Recipe, world_size: int, model: ModelConfig) -> Iterator[str]:
    """Yield a sentence for each thing that cannot work. `model`: the trained architecture."""
    yield from _problems_of_gates(recipe, model.num_experts)
    yield from _problems_of_experts(recipe, world_size, model.num_experts)
    yield from _problems_of_tasks(recipe)
    yield from _problems_of_bypassing(recipe, model.depth)
    yield from _problems_of_alignment(recipe, model.depth)
    if all(recipe.deepspeed.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")):
        yield "bf16.enabled and fp16.enabled are both true; enable one."
    yield from _problems_of_optimizers(recipe)
    yield from _idle_fields(recipe)


def _idle_fields(recipe: Recipe) -> Iterator[str]:
    """Yield fields that have no effect because another one is not set, contrary to the writer's expectation."""
    config = recipe.dpt
    logit_normal = config.diffusion.timesteps == "logit_normal"
    for name, default, needs, useful in (
        ("diffusion.timestep_location", 0.0, 'diffusion.timesteps "logit_normal"', logit_normal),
        ("diffusion.timestep_scale", 1.0, 'diffusion.timesteps "logit_normal"', logit_normal),
        ("training.ema_snapshot_every", 0, "training.ema_lengths", bool(config.training.ema_lengths)),
        ("training.bypass_first", 2, "training.bypass_share", config.training.bypass_share > 0.0),
        ("training.bypass_last", 4, "training.bypass_share", config.training.bypass_share > 0.0),
        ("model.base_head_size", 64, "model.base_width", config.model.base_width > 0),
    ):
        section, field = name.split(".")
        value = getattr(getattr(config, section), field)
        if value != default and not useful:
            yield f"dpt.{name} is {value:g}, which does nothing without dpt.{needs}; set that, or {name} to {default:g}."


def trains_with_muon(optimizer: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's "optimizer" object asks for Muon rather than AdamW."""
    return str(optimizer.get("type", "AdamW")).lower() == "muon"


def _problems_of_optimizers(recipe: Recipe) -> Iterator[str]:
    optimizer = recipe.deepspeed.get("optimizer", {})
    kind = optimizer.get("type", "AdamW")
    if str(kind).lower() not in ("adam", "adamw", "muon"):
        yield f'optimizer.type is "{kind}"; the optimizers here are AdamW and Muon (they carry the averaged weights).'
    if not trains_with_muon(optimizer):
        return
    if recipe.zero_stage == 3:
        yield "optimizer.type Muon needs whole matrices, which ZeRO stage 3 cuts up; set zero_optimization.stage to 2."
    if recipe.deepspeed.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        yield "zero_optimization.offload_optimizer does not go with optimizer.type Muon; remove it, or use AdamW."


def batch_split(recipe: Recipe, world_size: int) -> tuple[int, int, int]:
    """(train_batch_size, micro-batch of a rank, accumulation steps) on `world_size` ranks; their product with the ranks fits.

    `train_micro_batch_size_per_gpu` is the largest micro-batch allowed: the largest one up to it is used that divides a rank's
    share of the batch, unless `gradient_accumulation_steps` is given. Without `train_batch_size` it is DeepSpeed's, the
    product of the other two and the ranks. Raises UserError if there is no such split.
    """
    given = recipe.deepspeed
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = given.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            _refuse(recipe, f"{key} is {value!r}; it must be a whole number of at least 1.")
    total = given.get("train_batch_size")
    limit = given.get("train_micro_batch_size_per_gpu")
    accumulation = given.get("gradient_accumulation_steps")
    if total is None:
        if limit is None:
            if not recipe.path:
                raise UserError("no recipe is named: train_batch_size is missing; give a recipe with --ds_config FILE.")
            _refuse(recipe, "train_batch_size is missing; give the global batch size.")
        return limit * (accumulation or 1) * world_size, limit, accumulation or 1
    parts = (accumulation or 1) * world_size
    if total % parts:
        times = f" x gradient_accumulation_steps {accumulation}" if accumulation else ""
        near = [str(n) for n in (total // parts * parts, (total // parts + 1) * parts) if n]
        _refuse(
            recipe,
            f"train_batch_size {total} is not a multiple of {ranks_in_words(world_size)}{times}; change one of them "
            f"({' or '.join(near)} samples would do).",
        )
    if accumulation is None:
        share = total // world_size
        micro = next(n for n in range(min(share, limit or share), 0, -1) if share % n == 0)
        return total, micro, share // micro
    micro = total // parts
    if limit is not None and micro > limit:
        _refuse(
            recipe,
            f"gradient_accumulation_steps {accumulation} makes micro-batches of {micro} on {ranks_in_words(world_size)}, above "
            f"train_micro_batch_size_per_gpu {limit}; raise one of them, or leave gradient_accumulation_steps out.",
        )
    return total, micro, accumulation


def split_note(recipe: Recipe, world_size: int) -> str:
    """One line for the user if the micro-batch differs from the one in the recipe; else empty."""
    total, micro, accumulation = batch_split(recipe, world_size)
    limit = recipe.deepspeed.get("train_micro_batch_size_per_gpu", micro)
    if micro == limit:
        return ""
    return (
        f"Micro-batches of {micro} instead of {limit} (train_micro_batch_size_per_gpu, the most allowed): {total} samples on "
        f"{ranks_in_words(world_size)} are {total // world_size} each, {accumulation} x {micro}."
    )


def ranks_in_words(world_size: int) -> str:
    """ "1 rank", "8 ranks"."""
    return f"{world_size} rank{'s' * (world_size != 1)}"


def _problems_of_experts(recipe: Recipe, world_size: int, experts: int) -> Iterator[str]:
    ep_size, model = recipe.dpt.training.ep_size, recipe.dpt.model
    if ep_size > 1 and experts == 0:
        yield f"dpt.training.ep_size is {ep_size}, but the model is dense; set it to 1."
    if world_size % ep_size:
        yield f"dpt.training.ep_size {ep_size} does not divide {ranks_in_words(world_size)}; choose a divisor."
    if recipe.deepspeed.get("use_data_before_expert_parallelism", False):
        yield (
            "use_data_before_expert_parallelism is set, but here consecutive ranks share a layer's experts, as they exchange "
            "tokens in every layer; remove it."
        )
    for name, width in (("hidden_size", model.hidden_size), ("hidden_size x mlp_ratio", model.mlp_width)):
        if experts and recipe.precision == "bf16" and width % 8:
            yield f"dpt.model.{name} is {width}; experts' products in bf16 take multiples of 8: choose one, or train in fp32."
    if experts % ep_size:
        yield f"dpt.training.ep_size {ep_size} does not divide dpt.model.num_experts {experts}; choose a divisor."


def _problems_of_gates(recipe: Recipe, experts: int) -> Iterator[str]:
    """Yield problems of fields that have no meaning without experts, or with one kind of gate."""
    model, training = recipe.dpt.model, recipe.dpt.training
    for name, off, value in (
        ("model.router_gate", "softmax", model.router_gate),
        ("model.shared_expert_width", 0, model.shared_expert_width),
        ("model.router_bias_balancing", False, model.router_bias_balancing),
        ("training.expert_distance_every", 0, training.expert_distance_every),
    ):
        if not experts and value != off:
            yield f"dpt.{name} is {json.dumps(value)}, but the model is dense; set it to {json.dumps(off)}."
    if model.router_gate == "sigmoid" and training.router_z_loss_weight:
        yield (
            f"dpt.training.router_z_loss_weight is {training.router_z_loss_weight}, but the z-loss is defined for "
            'softmax gates only and dpt.model.router_gate is "sigmoid"; set it to 0.'
        )
    if training.expert_distance_every and experts == 1:
        yield "dpt.training.expert_distance_every is set, but a layer has one expert only; set it to 0."


def _problems_of_tasks(recipe: Recipe) -> Iterator[str]:
    config = recipe.dpt
    task, weight, conditions = config.task, config.pixel_loss.weight, config.model.num_conditions
    if weight and task not in get_args(Task):
        yield f'dpt.pixel_loss.weight is {weight}, but task "{task}" has none; set it to 0.'
    least, most = CONDITIONS[task]
    if not least <= conditions <= most:
        span = str(least) if least == most else f"{least} or {most}"
        yield f'dpt.model.num_conditions is {conditions}; task "{task}" has {span} condition latents.'
    if task != "class" and config.data.horizontal_flip:
        yield "dpt.data.horizontal_flip is for class images; perception shards are mirrored while encoding."
    if config.validation.every and task == "class":
        yield "dpt.validation.every is for perception; class images have no truths to be scored by."
    if config.validation.every and not (config.validation.data or config.evaluation.data):
        yield "dpt.validation.data is empty, and so is dpt.evaluation.data; name an evaluation shard folder."
    classes = config.model.num_classes
    wrong = [label for label in config.sampling.labels if not 0 <= label < classes]
    if task == "class" and wrong:
        yield f"dpt.sampling.labels has {wrong[0]}; dpt.model.num_classes is {classes}, so labels are 0 to {classes - 1}."
    if task == "class" and config.diffusion.one_step:
        yield 'dpt.diffusion.timesteps "last" is for perception; images of a class need several steps.'
    if weight and not config.diffusion.one_step:
        yield (
            f'dpt.pixel_loss.weight is {weight}, but dpt.diffusion.timesteps is "{config.diffusion.timesteps}"; it needs '
            '"last", where the network predicts what can be decoded.'
        )


def _problems_of_bypassing(recipe: Recipe, depth: int) -> Iterator[str]:
    training = recipe.dpt.training
    if training.bypass_share and not training.bypassed(depth):
        yield (
            f"dpt.training.bypass_share is {training.bypass_share:g}, but bypass_first {training.bypass_first} and bypass_last "
            f"{training.bypass_last} leave none of {depth} blocks between them; lower them."
        )

    if training.bypass_share and recipe.dpt.model.mlp_kernel_size:
        yield (
            f"dpt.training.bypass_share is {training.bypass_share:g}, but dpt.model.mlp_kernel_size is "
            f"{recipe.dpt.model.mlp_kernel_size}, which needs the whole grid of tokens in every block; set one of them to 0."
        )


def _problems_of_alignment(recipe: Recipe, depth: int) -> Iterator[str]:
    """Yield what self-alignment and feature alignment lack in the network, the averages and the data."""
    training = recipe.dpt.training
    own, features = training.self_alignment, training.feature_alignment
    blocks = {
        "self_alignment.teacher_block": own.teacher_block if own.weight else 0,
        "self_alignment.student_block": own.student_block if own.weight else 0,
        "feature_alignment.block": features.block if features.weight else 0,
    }
    for name, block in blocks.items():
        if block > depth:
            yield f"dpt.training.{name} is {block}, but the network has {depth} blocks; lower it."
        if training.bypass_share and block - 1 in training.bypassed(depth) and name != "self_alignment.teacher_block":
            yield (
                f"dpt.training.{name} is {block}, which tokens bypass (dpt.training.bypass_share {training.bypass_share:g}); "
                f"choose a block up to {training.bypass_first}, or one of the last {training.bypass_last}."
            )
    if own.weight and (training.teaching_decay == 0 or training.teaching_decay not in training.ema_decays):
        yield (
            f"dpt.training.self_alignment learns from the average of decay {training.teaching_decay:g}, which "
            f"dpt.training.ema_decays {training.ema_decays} does not keep; name one that it does, above 0."
        )
    if own.weight and recipe.dpt.diffusion.one_step:
        yield (
            'dpt.training.self_alignment needs several noise levels, and dpt.diffusion.timesteps is "last"; set its weight to '
            "0, or choose other timesteps."
        )
    if features.weight and not features.channels:
        yield (
            "dpt.training.feature_alignment.channels is 0; set it to the number of channels of the shards' features "
            "(normals: 3, segments: 13)."
        )
    if features.weight and recipe.dpt.data.horizontal_flip:
        yield (
            "dpt.data.horizontal_flip mirrors images, and shards hold no mirrored features for "
            "dpt.training.feature_alignment; set one of them to false or 0."
        )


def _refuse(recipe: Recipe, sentence: str) -> NoReturn:
    raise UserError(f"{recipe.source_of(sentence)}: {sentence}")
