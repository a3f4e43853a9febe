"""Errors observed in a study's runs: each evaluation with its model's size, training, method and test-time settings."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dpt.config.checks import batch_split
from dpt.config.recipe import DptConfig, Recipe
from dpt.config.sections import (
    DataConfig,
    FeatureAlignmentConfig,
    ModelConfig,
    PixelLossConfig,
    SelfAlignmentConfig,
    TrainingConfig,
)
from dpt.errors import UserError
from dpt.models import costs
from dpt.models.recipe_costs import step_macs
from dpt.scaling.compute import section
from dpt.scaling.results import evaluation_rows
from dpt.scores import METRICS
from dpt.tracking.read import RunRecord, ancestors

FACTORS = {
    "model": "active parameters of the model before upcycling",
    "tokens": "tokens of an image",
    "pretrain": "pre-training samples",
    "finetune": "fine-tuning samples, those after upcycling included",
}
"""Quantities that may vary in training, each with its unit."""
METHODS = {
    "diffusion.timesteps": "uniform",
    "diffusion.prediction_type": "epsilon",
    "diffusion.beta_schedule": "linear",
    "diffusion.loss": "mse",
    "model.mlp_kernel_size": "0",
    "pixel_loss.weight": "0.0",
    "training.bypass_share": "0.0",
    "training.self_alignment.weight": "0.0",
    "training.feature_alignment.weight": "0.0",
    "optimizer.type": "AdamW",
}
"""Fine-tuning fields that define its method, with their defaults, which older runs may not have recorded. A plan chooses among
the values that differ between runs, as it does among sampler steps."""

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


Kind = tuple[str, int, int, int, bool]
"""Method, side (`input_size`) and channels of the latents, `mlp_kernel_size`, and whether upcycled."""


class Setting(NamedTuple):
    """How a model was fine-tuned, and what its predictions take."""

    method: str
    """The METHODS that differ among the observations, as "field=value, ..."; empty if none do."""
    steps: int
    ensemble: int


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One evaluation of one trained model."""

    error: float
    """The error to minimise: the metric, or one minus it."""
    config: ModelConfig
    """The model before upcycling."""
    quantities: dict[str, float]
    """Value of every factor."""
    upcycled: bool
    setting: Setting
    recipe: Recipe
    """The parts of the fine-tuning recipe that affect its cost (`added_macs`)."""
    pretraining: Recipe | None
    """The same parts of the pre-training recipe; None: no pre-training."""
    run_id: str
    """The trained run (several settings of one run are not independent)."""
    evaluation_id: str
    """The run that measured it."""


def observe(
    records: Sequence[RunRecord], family: Sequence[RunRecord], task: str, metric: str, *, dataset: str = ""
) -> list[Observation]:
    """The evaluations among `records` of models trained for `task`; if there are none, those of generalists, which follow
    another law. Models trained from scratch count as having no pre-training; models that start from weights of no known run
    (imported ones) are left out, as their cost is unknown.

    Raises UserError if they are of several data sets and none is named.
    """
    found: list[tuple[str, str, dict[str, str], Observation]] = []  # (trained for, data set, fields of METHODS, ...)
    for record in records:
        rows = [r for r in evaluation_rows(record) if r.run is not None and r.task == task and metric in r.metrics]
        line = [r for r in ancestors(record, family) if r.stage != "evaluate"]
        samples = {
            stage: sum(r.metrics.get("train/samples_seen", 0.0) for r in line if r.stage == stage)
            for stage in ("pretrain", "finetune", "upcycle")
        }
        config = section(_before_upcycling(line), "model", ModelConfig) if line else None
        trained = line[0].params.get("task", task) if line else ""
        if config is None or trained not in (task, "generalist"):
            continue
        started = line[-1].parents or line[-1].params.get("training.weights")
        if started and not samples["pretrain"]:
            continue
        fields = {name: line[0].params.get(name, default) for name, default in METHODS.items()}
        quantities = factor_values(config, samples["pretrain"], samples["finetune"] + samples["upcycle"])
        before = next((r for r in line if r.stage == "pretrain"), None)
        for row in rows:
            if dataset in ("", row.dataset):
                value = row.metrics[metric]
                observation = Observation(
                    error=value if METRICS[metric].lower_is_better else 1 - value,
                    config=config,
                    quantities=quantities,
                    upcycled=samples["upcycle"] > 0,
                    setting=Setting("", row.steps or 0, row.ensemble or 0),
                    recipe=_costing(line[0]),
                    pretraining=_costing(before) if before else None,
                    run_id=line[0].run_id,
                    evaluation_id=record.run_id,
                )
                found.append((trained, row.dataset, fields, observation))
    chosen = task if any(trained == task for trained, *_ in found) else "generalist"
    found = [one for one in found if one[0] == chosen]
    if len(datasets := {name for _, name, *_ in found}) > 1:
        raise UserError(f"the evaluations are of {', '.join(sorted(datasets))}; choose one with --dataset.")
    varied = [name for name in METHODS if len({fields[name] for _, _, fields, _ in found}) > 1]
    named = []
    for *_, fields, observation in found:
        method = ", ".join(f"{name}={fields[name]}" for name in varied)
        named.append(replace(observation, setting=observation.setting._replace(method=method)))
    return named


def _costing(record: RunRecord) -> Recipe:
    """The parts of a training recipe that make its samples costlier or cheaper than the network alone."""
    given = {name: record.params.get(f"training.{name}") for name in ("bypass_share", "bypass_first", "bypass_last")}
    bypass: dict[str, Any] = {name: json.loads(value) for name, value in given.items() if value is not None}
    training = TrainingConfig(
        **bypass,
        self_alignment=section(record, "training.self_alignment", SelfAlignmentConfig) or SelfAlignmentConfig(),
        feature_alignment=section(record, "training.feature_alignment", FeatureAlignmentConfig) or FeatureAlignmentConfig(),
    )
    dpt = DptConfig(
        pixel_loss=section(record, "pixel_loss", PixelLossConfig) or PixelLossConfig(),
        data=section(record, "data", DataConfig) or DataConfig(),
        training=training,
    )
    optimizer = {"type": record.params.get("optimizer.type", "AdamW")}
    parts = {name: json.loads(record.params[name]) for name in _BATCH if name in record.params}
    batch = batch_split(Recipe(deepspeed=parts, dpt=dpt), int(record.tags.get("dpt.ranks", 1)))[0] if parts else 1
    return Recipe(deepspeed={"optimizer": optimizer, "train_batch_size": batch}, dpt=dpt)


def kind(method: str, config: ModelConfig, upcycled: bool) -> Kind:
    """What a fitted surface does not extrapolate over: a plan must match an observation in it."""
    return method, config.input_size, config.in_channels, config.mlp_kernel_size, upcycled


def added_macs(recipe: Recipe, config: ModelConfig) -> float:
    """MACs that a recipe's methods add to each sample of a model's training (including a share of Muon's products), or save
    (tokens that bypass blocks)."""
    return float(step_macs(recipe, config, recipe.deepspeed["train_batch_size"]).training - costs.macs(config).training)


def factor_values(config: ModelConfig, pretrain_samples: float, finetune_samples: float) -> dict[str, float]:
    """The value of every factor for a model before upcycling, and its training; no pre-training: trained from scratch."""
    return {
        "model": float(costs.num_params(config).active),
        "tokens": float(costs.num_tokens(config)),
        "pretrain": pretrain_samples,
        "finetune": finetune_samples,
    }


def _before_upcycling(line: Sequence[RunRecord]) -> RunRecord:
    """The newest run before upcycling in a line of runs (newest first); without upcycling, the newest."""
    upcycled = [place for place, run in enumerate(line) if run.stage == "upcycle"]
    older = line[upcycled[-1] + 1 :] if upcycled else line
    return older[0] if older else line[-1]
