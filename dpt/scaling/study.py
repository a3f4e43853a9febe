"""A study: a grid of launches described in one YAML file, and the figures made from them.

    title: Effect of model size
    output: runs/small                 # folders of all launches; studies may share one, and then share equal launches
    experiment: small-study
    axes:                              # axis -> value -> recipe fields
      size:
        w64: {model.hidden_size: 64, model.num_heads: 4}
        w128: {model.hidden_size: 128}
    stages:                            # in order; one launch for each combination of a stage's axes
      pretrain: {launcher: pretrain, recipe: ds_configs/quickstart.json, axes: [size], fields: {training.steps: 200}}
      depth: {launcher: finetune, recipe: ds_configs/quickstart_depth.json, axes: [size], weights: pretrain}
      evaluate: {launcher: evaluate, recipe: ds_configs/quickstart_depth.json, axes: [size], weights: depth}
    figures:
      - {name: size, x: macs, y: eval/depth/abs_rel}

`{size}` in a recipe's path stands for the value's name. An axis gives its fields to every stage that lists it, or only to
those that it names: `size: {stages: [pretrain], values: {...}}`; an evaluation takes only those of `evaluation` from axes.
`weights` names an earlier stage, whose launch with the same values provides them. `weights.step: N` among an axis's fields
takes them from the checkpoint that this launch has kept of its step N (`training.keep_every`). For an evaluation, put a
fine-tuning of `training.steps: 0` in between: its compute is that up to step N, whereas an evaluation that names the
checkpoint itself would be charged for the whole run.
"""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpt import hub
from dpt.config.checks import trained_model
from dpt.config.recipe import Recipe, load_recipe, section_from_dict
from dpt.errors import UserError
from dpt.models import costs
from dpt.models.recipe_costs import step_macs
from dpt.scaling.compute import WEIGHTS_STEP, prediction_macs
from dpt.scaling.points import FigureSpec


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One kind of launch."""

    launcher: Literal["pretrain", "finetune", "upcycle", "evaluate"]
    """Name of the launcher."""
    recipe: str
    """Recipe file; {axis} stands for a value's name."""
    axes: list[str] = field(default_factory=list)
    """Axes that it is launched over."""
    weights: str = ""
    """Earlier stage that provides the weights."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Recipe fields of every launch."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One run of a launcher."""

    name: str
    stage: str
    launcher: str
    recipe: str
    fields: dict[str, Any]
    values: dict[str, str]
    """Axis -> the name of its value."""
    folder: Path
    parent: str = ""
    """Name of the launch that provides the weights."""

    @property
    def result(self) -> Path:
        """The file that proves that it has finished."""
        return self.folder / ("summary.json" if self.launcher == "evaluate" else "weights/config.json")

    def arguments(self) -> list[str]:
        """Arguments after the launcher's file name."""
        fields = [word for name, value in self.fields.items() for word in (f"--{name}", _as_text(value))]
        return ["--ds_config", self.recipe, *fields]

    @functools.cached_property
    def resolved(self) -> Recipe:
        """The recipe that the launch resolves to; UserError if a field is wrong."""
        return load_recipe(self.recipe, self.fields)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as read from its file."""

    path: Path
    title: str
    output: Path
    experiment: str
    launches: list[Launch]
    figures: list[FigureSpec]
    needs: list[str]
    """Shard folders, weights and other files that must exist beforehand: those the file names, and those its recipes read."""

    def of_stages(self, stages: Sequence[str]) -> list[Launch]:
        """The launches of some stages; of all if none is named."""
        return [launch for launch in self.launches if not stages or launch.stage in stages]


def read_study(path: Path, *, uri: str) -> Study:
    """Read a study and unfold its grid; `uri` is the MLflow store of its runs. Raises UserError naming the key at fault."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: the study cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a study is a mapping of title, output, experiment, axes, stages and figures.")
    unknown = sorted(content.keys() - {"title", "output", "experiment", "axes", "stages", "figures", "needs"})
    if unknown or not isinstance(content.get("stages"), dict):
        raise UserError(f"{path}: " + (f'there is no key "{unknown[0]}".' if unknown else "stages is missing."))
    axes = {name: _axis(path, name, values) for name, values in (content.get("axes") or {}).items()}
    stages = {n: section_from_dict(StageSpec, s, f"{path}: stages.{n}") for n, s in content["stages"].items()}
    output, experiment = Path(content.get("output", "runs/study")), str(content.get("experiment", path.stem))
    frame = {"path": path, "output": output, "experiment": experiment, "uri": uri}
    launches = [launch for name in stages for launch in _unfold(frame, name, stages, axes)]
    return Study(
        path=path,
        title=str(content.get("title", path.stem)),
        output=output,
        experiment=experiment,
        launches=launches,
        figures=[section_from_dict(FigureSpec, f, f"{path}: figures") for f in content.get("figures") or []],
        needs=list(dict.fromkeys([*(content.get("needs") or []), *(p for launch in launches for p in read_by(launch))])),
    )


def read_by(launch: Launch) -> list[str]:
    """The shard folders, and the weights not made by another launch, that a launch reads from this machine's disks."""
    config = launch.resolved.dpt
    if launch.launcher == "evaluate":
        paths, weights = config.evaluation.data, config.evaluation.weights
    else:
        validation = (config.validation.data or config.evaluation.data) if config.validation.every else []
        paths, weights = [*config.data.shards, *validation], config.training.weights
    places = [*paths, *([] if launch.parent or not weights else [weights])]
    return [place.split("{")[0].rstrip("/") for place in places if "://" not in place and not hub.is_hub_name(place)]


@dataclass(frozen=True, kw_only=True)
class _Axis:
    values: dict[str, dict[str, Any]]
    stages: list[str] | None


def _axis(path: Path, name: str, given: Any) -> _Axis:
    if isinstance(given, dict) and given.keys() <= {"values", "stages"} and "values" in given:
        values, stages = given["values"], given.get("stages")
    else:
        values, stages = given, None
    if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
        raise UserError(f"{path}: axes.{name} must map each value's name to its recipe fields.")
    return _Axis(values={str(k): v for k, v in values.items()}, stages=stages)


def _unfold(study: dict[str, Any], name: str, stages: Mapping[str, StageSpec], axes: Mapping[str, _Axis]) -> list[Launch]:
    """The launches of a stage, one for each combination of its axes' values."""
    path, output, stage = study["path"], study["output"], stages[name]
    for axis in stage.axes:
        if axis not in axes:
            raise UserError(f'{path}: stages.{name}.axes: there is no axis "{axis}"; known: {", ".join(axes) or "none"}.')
    earlier = list(stages)[: list(stages).index(name)]
    if stage.weights and stage.weights not in earlier:
        raise UserError(f'{path}: stages.{name}.weights: there is no earlier stage "{stage.weights}".')
    if stage.weights and not set(stages[stage.weights].axes) <= set(stage.axes):
        raise UserError(f"{path}: stages.{name}.axes must hold all axes of {stage.weights}, which gives its weights.")
    home = "evaluation" if stage.launcher == "evaluate" else "training"
    launches = []
    for names in itertools.product(*(axes[a].values for a in stage.axes)):
        values = dict(zip(stage.axes, names, strict=True))
        full_name = "_".join([name, *names])
        fields = dict(stage.fields)
        for axis, value in values.items():
            if name in (axes[axis].stages or stages):
                fields |= axes[axis].values[value]
        step = fields.pop("weights.step", None)
        if step is not None and (home == "evaluation" or not stage.weights):
            raise UserError(
                f"{path}: stages.{name}: weights.step is for a training with weights; export the checkpoint for an evaluation "
                "by a stage of launcher finetune with training.steps 0."
            )
        if home == "evaluation":  # the axes' other fields are for the trainings that share the axes
            fields = {k: v for k, v in fields.items() if k.startswith("evaluation.") or k in stage.fields}
        parent = ""
        if stage.weights:
            parent = "_".join([stage.weights, *(values[a] for a in stages[stage.weights].axes)])
            place = "weights" if step is None else f"checkpoints/step_{step:08d}"
            fields[f"{home}.weights"] = str(output / parent / place)
        tags = {"dpt.label": " ".join(names) or name, "study.stage": name}
        tags |= {f"study.{axis}": value for axis, value in values.items()}
        tags |= {} if step is None else {WEIGHTS_STEP: str(step)}
        fields |= {
            f"{home}.output_dir": str(output / full_name),
            "tracking.uri": study["uri"],
            "tracking.experiment": study["experiment"],
            "tracking.run_name": full_name,
            "tracking.tags": tags,
        }
        launches.append(
            Launch(
                name=full_name,
                stage=name,
                launcher=stage.launcher,
                recipe=stage.recipe.format_map(values),
                fields=fields,
                values=values,
                folder=output / full_name,
                parent=parent,
            )
        )
    return launches


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def expected_macs(study: Study, launch: Launch) -> float:
    """MACs of a training launch; for an evaluation, those of one image at all its settings, members shared.

    0 for an evaluation of weights that the study does not train.
    """
    recipe = launch.resolved
    if launch.launcher != "evaluate":
        model = trained_model(recipe, launch.launcher)
        batch = recipe.deepspeed.get("train_batch_size", 1)
        return float(step_macs(recipe, model, batch).training) * recipe.dpt.training.steps * batch
    parent = next((other for other in study.launches if other.name == launch.parent), None)
    if parent is None:
        return 0.0
    evaluation = recipe.dpt.evaluation.settled(parent.resolved.dpt.diffusion)
    forward = costs.macs(trained_model(parent.resolved, parent.launcher)).forward
    return prediction_macs(forward, task=recipe.dpt.task, steps=sum(evaluation.steps), ensemble=max(evaluation.ensemble))
