"""What a run holds around its engine, opened where it begins: pixel loss, saver of checkpoints, MLflow run, records."""

from pathlib import Path

import torch

from dpt import distributed
from dpt.config.recipe import DptConfig, Recipe
from dpt.models.costs import Macs, num_params
from dpt.tracking import Run, start_run
from dpt.training.averages import first_spacing
from dpt.training.data_loader import DataLoader
from dpt.training.engine import Engine
from dpt.training.outputs import AVERAGES, CHECKPOINTS
from dpt.training.pixel_loss import PixelLoss
from dpt.training.records import Recorder, data_sheet_flops, measure_peak_flops
from dpt.training.sampling import load_codec
from dpt.training.saving import Saver, SnapshotWriter
from dpt.training.stages import Stage
from dpt.training.state import RunState
from dpt.training.validation import OpenValidator, Validator


def open_validator(config: DptConfig, loader: DataLoader, make: OpenValidator | None) -> Validator | None:
    """What scores networks for `dpt.validation`; None if the recipe does not ask for it."""
    if not config.validation.every:
        return None
    assert make is not None, "launchers give one"
    with distributed.shared_errors():
        return make(config, loader.codes, loader.depth_prompt)


def open_pixel_loss(recipe: Recipe, loader: DataLoader) -> PixelLoss | None:
    """With the decoder on the training device: in bf16 beside a network that is not in float32, on a GPU."""
    if not recipe.dpt.pixel_loss.weight:
        return None
    with distributed.shared_errors():
        codec = load_codec(recipe.dpt, loader.vae)
    device = distributed.device()
    half = device.type == "cuda" and recipe.precision != "fp32"
    codec.to(device, torch.bfloat16 if half else torch.float32)
    return PixelLoss(recipe.dpt, codec, codes=loader.codes)


def open_saver(config: DptConfig, output_dir: Path, step: int) -> Saver:
    """Of checkpoints and snapshots; snapshots made after `step` belong to a course that this run leaves, and are removed."""
    training, snapshots = config.training, None
    if training.ema_lengths:
        every = training.ema_snapshot_every or first_spacing(training.steps, training.ema_snapshots)
        snapshots = SnapshotWriter(output_dir / AVERAGES, every=every, most=training.ema_snapshots)
        snapshots.forget_after(step)
    return Saver(output_dir / CHECKPOINTS, keep_last=training.keep_last, keep_every=training.keep_every, snapshots=snapshots)


def open_tracking(stage: Stage, loader: DataLoader, output_dir: Path, state: RunState) -> Run:
    """The run's record in MLflow, its data sets logged; a run that has an id is resumed at its step."""
    recipe, config = stage.recipe, stage.recipe.dpt
    with distributed.shared_errors():
        run = start_run(
            config.tracking,
            stage=stage.name,
            name=f"{stage.name} {config.task} {config.model.preset}",
            params=recipe.to_dict(),
            parents=stage.parents,
            output_dir=output_dir,
            tags=_tags(config, loader),
            resume_run_id=state.run_id or None,
            past_step=state.step or -1,
        )
    for source, manifest in zip(loader.stream.manifests, loader.manifests, strict=True):
        run.log_dataset(
            f"{manifest.dataset}/{manifest.split}",
            digest=manifest.data_sha256,
            source=source,
            context="training",
            profile=manifest.profile,
        )
    return run


def _tags(config: DptConfig, loader: DataLoader) -> dict[str, str]:
    """What tells runs apart on MLflow's pages, beside their parameters."""
    model = config.model
    return {
        "dpt.data_sha256": loader.data_sha256,
        "dpt.ranks": str(distributed.world_size()),
        "dpt.task": config.task,
        "dpt.model": f"{model.num_experts} experts, top {model.top_k}" if model.num_experts else "dense",
        "dpt.parameters": f"{num_params(model).total / 1e6:.4g}M",
        "dpt.dataset": ", ".join(f"{m.dataset}/{m.split}" for m in loader.manifests),
    }


def open_recorder(recipe: Recipe, engine: Engine, tracking: Run, macs: Macs, output_dir: Path, step: int) -> Recorder:
    """Records from `step` on."""
    config = recipe.dpt
    return Recorder(
        output_dir,
        tracking,
        step=step,
        steps=config.training.steps,
        every=config.training.log_every,
        global_batch_size=engine.global_batch_size,
        macs={"forward": macs.forward, "training": macs.training},
        matrix_flops=measure_peak_flops(engine.device, engine.dtype),
        data_sheet_flops=data_sheet_flops(engine.device, recipe.precision),
        dense=config.model.num_experts == 0,
        further_losses=_further_losses(config),
    )


def _further_losses(config: DptConfig) -> list[str]:
    """The optional losses that a recipe trains with, by their names in records."""
    weights = {
        "pixel_loss": config.pixel_loss.weight,
        "self_alignment_loss": config.training.self_alignment.weight,
        "feature_alignment_loss": config.training.feature_alignment.weight,
    }
    return [name for name, weight in weights.items() if weight]


def announce(stage: Stage, engine: Engine, loader: DataLoader, step: int) -> None:
    """Say in one line what is about to be trained."""
    recipe, ranks = stage.recipe, distributed.world_size()
    params = num_params(recipe.dpt.model)
    distributed.log(
        f"{stage.name}: {recipe.dpt.task}, {params.total / 1e6:.2f}M parameters ({params.active / 1e6:.2f}M active), "
        f"{ranks} rank{'s' * (ranks > 1)} on {engine.device.type}, {recipe.precision}, ZeRO {recipe.zero_stage}, "
        f"batch {engine.global_batch_size} = {engine.micro_batch_size} x {engine.accumulation} micro-batches x {ranks}, "
        f"{loader.stream.num_samples} samples, steps {step} to {recipe.dpt.training.steps}."
    )
