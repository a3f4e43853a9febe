"""The stages of training: the network that each one trains, and the source of its initial weights. They share the rest."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dpt import distributed, hub
from dpt.config.checks import trained_model
from dpt.config.recipe import Recipe
from dpt.errors import UserError
from dpt.fits import Fit, fits_of
from dpt.models.adapting import adapt
from dpt.models.attention import use_backend
from dpt.models.dit import DiT
from dpt.models.upcycling import upcycle
from dpt.models.weights import Weights
from dpt.target_codes import TARGET_CODES, target_code
from dpt.training.export import load_weights
from dpt.training.resume import Found


@dataclass(kw_only=True)
class Stage:
    """A stage's recipe, initial weights and their origin."""

    name: str
    """ "pretrain", "finetune" or "upcycle"."""
    recipe: Recipe
    """The recipe with the trained architecture: upcycled in the stage "upcycle"."""
    start: Weights | None = None
    """Initial weights for that architecture; None: random ones, or a checkpoint's."""
    sections: Mapping[str, Any] = field(default_factory=dict)
    """Config sections of the initial weights, or of the checkpoint's."""
    source: str = ""
    """Where the initial weights come from."""
    parents: list[str] = field(default_factory=list)
    """Ids of the runs that made the initial weights."""
    origin: str = ""
    """Hub name, with commit, of the initial weights; empty if they came from this machine."""

    @property
    def codes(self) -> dict[str, str]:
        """How targets were coded when the initial weights were trained, by task, for the tasks that they learnt."""
        learnt = [task for task in TARGET_CODES if self.sections.get("task") in (task, "generalist")]
        return {task: target_code(task, self.sections, self.source) for task in learnt}

    @property
    def fits(self) -> dict[str, Fit]:
        """How pictures were resized when the initial weights were trained, by task, if recorded."""
        said = self.sections.get("fits") or {}
        return {task: fit for task, fit in fits_of(self.sections, self.source).items() if task in said}

    def build(self) -> DiT:
        """Build the network with its initial weights; with expert parallelism, this rank's experts."""
        config = self.recipe.dpt
        distributed.log(use_backend(config.attention_backend))
        torch.manual_seed(config.training.seed)
        network = DiT(config.model, ep_size=config.training.ep_size)
        if self.start is not None:
            network.load_state_dict(self.start.state)
        network.set_activation_checkpointing(config.training.activation_checkpointing)
        if config.training.compile:
            network.compile_blocks()
        return network


def open_stage(recipe: Recipe, name: str, found: Found | None = None) -> Stage:
    """Open the stage `name` of a recipe and read its initial weights.

    `found`: the checkpoint that the run resumes from; weights are then not read. UserError if the weights are missing, or do
    not fit the recipe.
    """
    config = recipe.dpt
    trained = dataclasses.replace(recipe, dpt=dataclasses.replace(config, model=trained_model(recipe, name)))
    if found is not None:
        checkpoint, state = found
        origin = state["sections"]["lineage"].get("weights", "")
        return Stage(
            name=name,
            recipe=trained,
            sections=state["sections"],
            source=str(checkpoint),
            parents=state["parents"],
            origin=origin,
        )
    path = config.training.weights
    if not path:
        if name == "upcycle":
            raise UserError("dpt.training.weights is empty; upcycling starts from the weights of a dense model.")
        if name == "finetune":
            distributed.log("dpt.training.weights is empty: fine-tuning starts from random weights.")
        return Stage(name=name, recipe=trained)
    path = hub.pinned(path)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, weights=path))
    trained = dataclasses.replace(trained, dpt=dataclasses.replace(trained.dpt, training=config.training))
    read = load_weights(path, ema=config.training.use_ema)
    kind = read.source
    if name == "upcycle" and (size := read.config.mlp_kernel_size):
        raise UserError(
            f"dpt.training.weights: {path} has convolutions in its MLPs (dpt.model.mlp_kernel_size {size}), which experts "
            "cannot have; upcycle weights trained without them."
        )
    weights = adapt(dataclasses.replace(read, source=path), config.model)
    told = (weights.sections.get("diffusion") or {}).get("time_convention", config.diffusion.time_convention)
    if told != config.diffusion.time_convention:
        raise UserError(
            f'dpt.diffusion.time_convention is "{config.diffusion.time_convention}", but the weights in {path} '
            f'learnt with "{told}"; set it to that.'
        )
    if name == "upcycle":
        weights = upcycle(weights, config.upcycling, seed=config.training.seed)
    lineage = weights.sections.get("lineage", {})
    distributed.log(f"Weights to start from: {path} ({kind}{', averaged' if weights.averaged else ''}).")
    return Stage(
        name=name,
        recipe=trained,
        start=weights,
        sections=weights.sections,
        source=path,
        parents=[lineage["run_id"]] if lineage.get("run_id") else [],
        origin=path if hub.is_hub_name(path) else "",
    )
