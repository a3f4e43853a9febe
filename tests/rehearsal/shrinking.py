"""A shipped recipe made small enough for any machine: other sizes, everything else as it is."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpt.config.checks import batch_split
from dpt.config.recipe import Recipe, load_recipe
from dpt.config.sections import ModelConfig
from dpt.data.codec import load_vae
from dpt.data.manifest import VAERecord
from dpt.embedded import EMBEDDED_VAES
from dpt.models.dit import DiT
from dpt.models.exporting import export_weights
from dpt.models.weights import Weights
from tests.shards import moments, write_set

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "ds_configs").glob("*.json"))

SIZES = {  # the only fields that a rehearsal may change, and why
    "model.input_size": "side of the latents",
    "model.hidden_size": "width",
    "model.depth": "depth",
    "model.num_heads": "heads of 16 channels",
    "model.shared_expert_width": "width of the shared expert, as a multiple of the network's",
    "train_batch_size": "samples of a step; as many micro-batches as shipped, but at most two",
    "train_micro_batch_size_per_gpu": "samples of a micro-batch",
    "training.ep_size": "at most four ranks share a layer's experts, two where each would trace the network to compile it",
    "training.steps": "length",
    "training.output_dir": "place",
    "training.weights": "place of first weights, made here in this size",
    "data.shards": "place of shards, made here in this size",
    "data.vae": "the embedded VAE where the shipped one is a published one, which is not here",
    "sampling.num_inference_steps": "steps of the sampler that draws classes",
    "tracking.enabled": "off: another process's work, which tests/tracking holds",
}


def stage_of(name: str) -> str:
    """The launcher of a recipe's file name."""
    if name.endswith("upcycle"):
        return "upcycle"
    first = name.split("_")[0]
    return {"finetune": "finetune", "upcycle": "upcycle", "best": "finetune"}.get(first, "pretrain")


def shipped_ranks(recipe: Recipe) -> int:
    """The ranks that a recipe is made for."""
    found = re.match(r"(?:CPU, )?(\d+) ", recipe.dpt.hardware)
    assert found
    return int(found[1])


def rehearsed_ranks(recipe: Recipe) -> int:
    """Those of its rehearsal: as many as share experts, two for other recipes of several."""
    ep_size = _ep_size(recipe)
    return ep_size if ep_size > 1 else min(shipped_ranks(recipe), 2)


def _ep_size(recipe: Recipe) -> int:
    return min(recipe.dpt.training.ep_size, 2 if recipe.dpt.training.compile else 4)


def shrink(recipe: Recipe, *, shards: list[str], weights: str, output_dir: str, steps: int) -> dict[str, Any]:
    """Overrides (dotted name -> value) that make a rehearsal of a shipped recipe: sizes and places, nothing else."""
    model, training = recipe.dpt.model, recipe.dpt.training
    ranks = rehearsed_ranks(recipe)
    accumulation = min(batch_split(recipe, shipped_ranks(recipe))[2], 2)
    values: dict[str, Any] = {
        "model.input_size": max(4, model.input_size // 8),
        "model.hidden_size": 32,
        "model.depth": 2,
        "model.num_heads": 2,
        "train_batch_size": 2 * accumulation * ranks,
        "training.steps": steps,
        "training.output_dir": output_dir,
        "data.shards": shards,
        "data.vae": _vae(recipe),
        "tracking.enabled": False,
    }
    if model.shared_expert_width:
        values["model.shared_expert_width"] = 32 * model.shared_expert_width // model.hidden_size
    if "train_micro_batch_size_per_gpu" in recipe.deepspeed:
        values["train_micro_batch_size_per_gpu"] = 2
    if _ep_size(recipe) < training.ep_size:
        values["training.ep_size"] = _ep_size(recipe)
    if training.weights:
        values["training.weights"] = weights
    if recipe.dpt.task == "class":
        values["sampling.num_inference_steps"] = 2
    return values


def _vae(recipe: Recipe) -> str:
    """The recipe's own VAE if it is embedded, the usual one if not: published ones are not here."""
    return recipe.dpt.data.vae if recipe.dpt.data.vae in EMBEDDED_VAES else "embedded"


def prepare_places(path: Path, folder: Path, steps: int = 2) -> dict[str, Any]:
    """Make a recipe's shards and first weights below `folder`; `shrink`'s overrides for them."""
    recipe = load_recipe(path)
    config = recipe.dpt
    sets = [Path(shipped) for shipped in config.data.shards]
    shards = [str(folder / f"{place.parent.name}_{place.name}") for place in sets]
    fields = shrink(recipe, shards=shards, weights=str(folder / "weights"), output_dir=str(folder / "run"), steps=steps)
    small, vae = load_recipe(path, fields).dpt.model, load_vae(fields["data.vae"]).record
    for shipped, place in zip(config.data.shards, shards, strict=True):
        task = config.task if config.task != "generalist" else set_task(shipped)
        sizes = {"side": small.input_size, "clip": small.clip_embedding_size, "classes": min(small.num_classes, 8)}
        make_shards(Path(place), task, vae=vae, **sizes)
    if config.training.weights:
        make_weights(folder / "weights", source_model(recipe, fields))
    return fields


def source_model(recipe: Recipe, values: dict[str, Any]) -> ModelConfig:
    """The network whose weights a rehearsal starts from: upcycling from a dense one of the recipe's own kind, fine-tuning from
    one pre-trained on classes."""
    small = load_recipe(recipe.path, values).dpt
    if stage_of(Path(recipe.path).stem) == "upcycle":
        return small.model
    classes = small.model.num_classes - small.model.patch_embed_tasks
    return replace(small.model, num_conditions=0, patch_embed_tasks=0, clip_embedding_size=0, num_classes=classes)


def make_weights(folder: Path, config: ModelConfig) -> Path:
    """Random weights (none of them zero) of a network, exported."""
    torch.manual_seed(0)
    state, averaged = ({n: t + 0.02 * torch.randn_like(t) for n, t in DiT(config).state_dict().items()} for _ in range(2))
    return export_weights(Weights(config=config, state=state), folder, ema=averaged)


def set_task(shards: str) -> str:
    """The task of a shipped recipe's shard folder, by its data set's name."""
    for name, task in (("flying_chairs", "flow"), ("pix2gestalt", "amodal"), ("hypersim", "depth"), ("depth", "depth")):
        if name in shards:
            return task
    return "class"


def make_shards(folder: Path, task: str, *, side: int, vae: VAERecord, clip: int, classes: int) -> Path:
    """Four tiny shards with all members that such a set has. `clip`: width of its CLIP embeddings, 0 for none."""
    random = np.random.default_rng(0)
    fields = {"dataset": folder.name, "task": task, "resolution": 8 * side, "vae": vae}
    fields["class_names"] = tuple(f"class {number}" for number in range(classes)) if task == "class" else ()
    return write_set(folder, [6] * 4, lambda _: _sample(random, task, side, vae.latent_channels, clip, classes), **fields)


def _sample(random: np.random.Generator, task: str, side: int, channels: int, clip: int, classes: int) -> dict[str, np.ndarray]:
    def latents(*leading: int) -> np.ndarray:
        return moments(random, side, *leading, channels=channels)

    if task == "class":
        label = np.array(random.integers(classes), dtype=np.int64)
        return {"label": label, "latents": latents(), "latents_mirrored": latents()}
    members = {"valid": (random.random((side, side)) > 0.2).astype(np.uint8)}
    if task == "amodal" and clip:
        members["clip"] = random.normal(size=clip).astype(np.float32)
    return {
        **members,
        "cond_latents": latents(2),
        "target_latents": latents(2 if task == "flow" else 1),
    }
