"""A run's state in each process: opened from a recipe and, if it resumes, a checkpoint; restored, rewound, saved, closed."""

from pathlib import Path
from typing import Any

import torch

from dpt import distributed
from dpt.config.checks import batch_split
from dpt.config.recipe import DptConfig, Recipe
from dpt.errors import UserError
from dpt.models.costs import num_params
from dpt.models.recipe_costs import step_macs
from dpt.tracking import Run, start_run, watch_node
from dpt.training.averages import first_spacing
from dpt.training.continuing import check_data
from dpt.training.control import Control
from dpt.training.data_loader import DataLoader, open_data_loader
from dpt.training.engine import Engine
from dpt.training.engine_state import restore
from dpt.training.expert_pictures import ExpertPictures
from dpt.training.failure import TrainingFailed, failure_report
from dpt.training.fragments import parameter_shapes
from dpt.training.outputs import AVERAGES, CHECKPOINTS
from dpt.training.pixel_loss import PixelLoss
from dpt.training.records import Recorder
from dpt.training.resume import Found, check_network, position_of, remarks, rewind_target
from dpt.training.sampling import load_codec
from dpt.training.saving import Saver, SnapshotWriter
from dpt.training.stages import Stage, open_stage
from dpt.training.state import RunState
from dpt.training.step import LossModule, Preparation
from dpt.training.validation import OpenValidator
from dpt.training.watchdog import Watchdog


class Session:
    """A run in progress. `found`: the checkpoint that it resumes from. All methods are collective."""

    def __init__(
        self, recipe: Recipe, stage_name: str, found: Found | None, open_validator: OpenValidator | None = None
    ) -> None:
        self.training = recipe.dpt.training
        self.output_dir = Path(self.training.output_dir)
        self.state = RunState.of(found[1]) if found is not None else RunState()
        self.control, self.watchdog = Control(), Watchdog(self.training.timeout_s)
        try:
            self._build(recipe, stage_name, found, open_validator)
        except UserError:  # on all ranks together
            self.control.close()
            self.watchdog.close()
            raise

    def _build(self, recipe: Recipe, stage_name: str, found: Found | None, open_validator: OpenValidator | None) -> None:
        with distributed.shared_errors():
            self.stage = open_stage(recipe, stage_name, found)
            self.recipe, self.config = self.stage.recipe, self.stage.recipe.dpt
        self._open_data_loader()
        if found is not None:
            check_data(*found, recipe, self.data_loader.data_sha256)
        self.validator = None
        if self.config.validation.every:
            assert open_validator is not None, "launchers give one"
            with distributed.shared_errors():
                self.validator = open_validator(self.config, self.data_loader.codes, self.data_loader.depth_prompt)
        pixel_loss = _open_pixel_loss(self.recipe, self.data_loader)
        batch, _, _ = batch_split(self.recipe, distributed.world_size())
        self.macs = step_macs(self.recipe, self.config.model, batch, *self.data_loader.latent_size)
        module = LossModule(self.stage.build(), self.config, pixel_loss)
        self.engine, self.teacher = Engine(self.recipe, module), module.teacher
        self.stage.start = None  # the engine has them now
        if found is not None:
            self._restore(*found)
        self.prepare = Preparation(
            self.config,
            tasks=self.data_loader.tasks,
            scaling=self.data_loader.scaling,
            device=self.engine.device,
            dtype=self.engine.dtype,
        )
        self.saver = _open_saver(self.config, self.output_dir, self.state.step)
        self.expert_pictures = ExpertPictures(self.engine.module.network, self.config, self.output_dir / "routing")  # type: ignore[arg-type]
        self.tracking = _open_tracking(self.stage, self.data_loader, self.output_dir, self.state)
        self.state.run_id = distributed.broadcast_object(self.tracking.run_id)
        self.node_watch = watch_node(self.config.tracking, run_id=self.state.run_id, output_dir=self.output_dir)
        self._open_recorder()

    def _open_data_loader(self) -> None:
        """Start reading at `position`."""
        total, micro, _ = batch_split(self.recipe, distributed.world_size())
        with distributed.shared_errors():
            self.data_loader = open_data_loader(
                self.config,
                global_batch_size=total,
                micro_batch_size=micro,
                start_sample=self.state.position,
                pin_memory=distributed.device().type == "cuda",
                codes=self.stage.codes,
            )
        hashes = distributed.gather_objects(self.data_loader.data_sha256)
        if others := [rank for rank, sha256 in enumerate(hashes) if sha256 != hashes[0]]:
            raise UserError(
                f"dpt.data.shards: rank {others[0]} finds other shards there than rank 0 does; give all nodes the same."
            )
        self.batches = iter(self.data_loader.stream)

    def _open_recorder(self) -> None:
        self.recorder = Recorder(self.recipe, self.engine, self.tracking, self.macs, self.output_dir, self.state.step)

    def announce(self) -> None:
        """Announce in one line what is about to be trained."""
        ranks, params, engine = distributed.world_size(), num_params(self.config.model), self.engine
        distributed.log(
            f"{self.stage.name}: {self.config.task}, {params.total / 1e6:.2f}M parameters ({params.active / 1e6:.2f}M active), "
            f"{ranks} rank{'s' * (ranks > 1)} on {engine.device.type}, {self.recipe.precision}, ZeRO {self.recipe.zero_stage}, "
            f"batch {engine.global_batch_size} = {engine.micro_batch_size} x {engine.accumulation} micro-batches x {ranks}, "
            f"{self.data_loader.stream.num_samples} samples, steps {self.state.step} to {self.training.steps}."
        )

    def save(self) -> None:
        """Start writing a checkpoint."""
        self.watchdog.beat(self.state.step, "saving")
        self.saver.begin(self.engine, self.state.step, self.state.for_checkpoint(self.stage, self.sections()))

    def sections(self) -> dict[str, Any]:
        """Sections of config.json for the current weights."""
        return self.state.for_weights(self.stage, self.data_loader, self.macs.training)

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        check_network(checkpoint, state, self.recipe, parameter_shapes(self.engine.module))
        restore(self.engine, checkpoint, state)
        self.state = RunState.of(state)
        for sentence in remarks(checkpoint, state, self.recipe, self.data_loader.data_sha256):
            distributed.log(sentence)

    def rewind(self, loss: float, keys: list[str]) -> None:
        """Rewind to a checkpoint after too many skipped steps in a row, once to each, and continue after the failing samples.

        `loss` and `keys`: of the last step, and this rank's samples in it. TrainingFailed if there is no such checkpoint.
        """
        if self.saver.pending:
            self.saver.finish()
        found = rewind_target(self.saver.folder, self.state.skipped_samples)
        if found is None:
            rewound = bool(self.state.skipped_samples.count)
            raise TrainingFailed(failure_report(self.engine, self.output_dir, self.state.step, loss, keys, rewound))
        first, end = position_of(found[1]), self.state.position
        distributed.log(
            f"{self.state.skipped_in_a_row} steps in a row up to step {self.state.step} were not finite: rewinding to "
            f"{found[0]}; samples {first} to {end - 1} of the stream, which led there, are skipped."
        )
        self._restore(*found)
        self.saver.forget_after(self.state.step)
        self.state.skipped_samples = self.state.skipped_samples.plus(first, end)
        self.tracking.set_tags({"dpt.skipped_samples": str(self.state.skipped_samples)})
        self.batches.close()  # type: ignore[attr-defined]
        self._open_data_loader()
        self._open_recorder()

    def close(self, status: str) -> None:
        """Close everything in order; MLflow's run gets `status`."""
        self.batches.close()  # type: ignore[attr-defined]
        self.watchdog.close()
        self.control.close()
        self.node_watch.finish()
        self.tracking.finish(status)


def _open_pixel_loss(recipe: Recipe, loader: DataLoader) -> PixelLoss | None:
    """Open the loss with the decoder on the training device: in bf16 on a GPU unless the network is float32."""
    if not recipe.dpt.pixel_loss.weight:
        return None
    with distributed.shared_errors():
        codec = load_codec(recipe.dpt, loader.vae)
    device = distributed.device()
    half = device.type == "cuda" and recipe.precision != "fp32"
    codec.to(device, torch.bfloat16 if half else torch.float32)
    return PixelLoss(recipe.dpt, codec, codes=loader.codes)


def _open_saver(config: DptConfig, output_dir: Path, step: int) -> Saver:
    """Open the saver of checkpoints and snapshots; remove snapshots after `step`, which belong to a course this run leaves."""
    training, snapshots = config.training, None
    if training.ema_lengths:
        every = training.ema_snapshot_every or first_spacing(training.steps, training.ema_snapshots)
        snapshots = SnapshotWriter(output_dir / AVERAGES, every=every, most=training.ema_snapshots)
        snapshots.forget_after(step)
    return Saver(output_dir / CHECKPOINTS, keep_last=training.keep_last, keep_every=training.keep_every, snapshots=snapshots)


def _open_tracking(stage: Stage, loader: DataLoader, output_dir: Path, state: RunState) -> Run:
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
    """Tags that distinguish runs on MLflow's pages, beyond their parameters."""
    model = config.model
    return {
        "dpt.data_sha256": loader.data_sha256,
        "dpt.ranks": str(distributed.world_size()),
        "dpt.task": config.task,
        "dpt.model": f"{model.num_experts} experts, top {model.top_k}" if model.num_experts else "dense",
        "dpt.parameters": f"{num_params(model).total / 1e6:.4g}M",
        "dpt.dataset": ", ".join(f"{m.dataset}/{m.split}" for m in loader.manifests),
    }
