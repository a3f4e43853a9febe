"""The training loop that all stages share."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

from dpt import distributed
from dpt.config.checks import batch_split
from dpt.config.recipe import Recipe
from dpt.errors import UserError
from dpt.locking import held
from dpt.models.expert_distance import expert_distances
from dpt.models.moe import EarlierRouting
from dpt.models.recipe_costs import step_macs
from dpt.scores import with_unit
from dpt.tracking import watch_node
from dpt.training import opening
from dpt.training.checkpoint import checkpoint_name
from dpt.training.continuing import check_course, check_data
from dpt.training.control import Control
from dpt.training.data_loader import open_data_loader
from dpt.training.deepspeed_internals import gathered
from dpt.training.engine import Engine, StepResult
from dpt.training.engine_state import restore
from dpt.training.expert_pictures import ExpertPictures
from dpt.training.export import export
from dpt.training.failure import TrainingFailed, failure_report
from dpt.training.fragments import parameter_shapes
from dpt.training.optimizer import learning_rate
from dpt.training.outputs import BEST, CHECKPOINTS, WEIGHTS, exported_step
from dpt.training.resume import Found, check_network, find_checkpoint, position_of, remarks, rewind_target
from dpt.training.sampling import averaged_network, save_class_samples
from dpt.training.stages import open_stage
from dpt.training.state import RunState
from dpt.training.step import Losses, LossModule, Preparation
from dpt.training.validation import Best, OpenValidator, export_averaged
from dpt.training.watchdog import Watchdog


def train(recipe: Recipe, stage_name: str, open_validator: OpenValidator | None = None) -> None:
    """Run a stage: from its start, or its newest checkpoint, to exported weights. Raises UserError and TrainingFailed.

    `open_validator`: makes what scores networks for `dpt.validation`.
    """
    with held(Path(recipe.dpt.training.output_dir)):
        _train(recipe, stage_name, open_validator)


def _train(recipe: Recipe, stage_name: str, open_validator: OpenValidator | None) -> None:
    training = recipe.dpt.training
    checkpoints, weights = Path(training.output_dir) / CHECKPOINTS, Path(training.output_dir) / WEIGHTS
    found = find_checkpoint(checkpoints, resume=training.resume)
    if found is not None:
        with distributed.shared_errors():
            check_course(*found, recipe, stage_name)
    if found is None or (found[1]["step"] < training.steps and not Best.of(found[1]).stopped):
        Trainer(recipe, stage_name, found, open_validator).run()
    else:
        if distributed.is_main() and exported_step(weights) != found[1]["step"]:
            export(found[0], weights)
        distributed.log(f"{found[0]} is of the last step already; weights: {weights}")


class Trainer:
    """A run in progress. `found`: the checkpoint that it goes on from. All methods are collective."""

    def __init__(
        self, recipe: Recipe, stage_name: str, found: Found | None, open_validator: OpenValidator | None = None
    ) -> None:
        self.training = recipe.dpt.training
        self.output_dir = Path(self.training.output_dir)
        self.state = RunState.of(found[1]) if found is not None else RunState()
        self.control, self.watchdog = Control(), Watchdog(self.training.timeout_s)
        self.control.listen()
        try:
            self._build(recipe, stage_name, found, open_validator)
        except UserError:  # on all ranks together
            self.control.unlisten()
            self.watchdog.close()
            raise

    def _build(self, recipe: Recipe, stage_name: str, found: Found | None, open_validator: OpenValidator | None) -> None:
        with distributed.shared_errors():
            self.stage = open_stage(recipe, stage_name, found)
            self.recipe, self.config = self.stage.recipe, self.stage.recipe.dpt
        self._open_data_loader()
        if found is not None:
            check_data(*found, recipe, self.data_loader.data_sha256)
        self.validator = opening.open_validator(self.config, self.data_loader, open_validator)
        pixel_loss = opening.open_pixel_loss(self.recipe, self.data_loader)
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
        self.saver = opening.open_saver(self.config, self.output_dir, self.state.step)
        self.expert_pictures = ExpertPictures(self.engine.module.network, self.config, self.output_dir / "routing")  # type: ignore[arg-type]
        self.tracking = opening.open_tracking(self.stage, self.data_loader, self.output_dir, self.state)
        self.state.run_id = distributed.broadcast_object(self.tracking.run_id)
        self.node_watch = watch_node(self.config.tracking, run_id=self.state.run_id, output_dir=self.output_dir)
        self._open_recorder()

    # --- the loop -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step (or to a signal), checkpoint, and export. Raises TrainingFailed."""
        try:
            self._train()
        except TrainingFailed:  # on all ranks together
            self._close("FAILED")
            raise
        except Exception as error:
            if not isinstance(error, UserError):
                time.sleep(3.0)  # a lost connection is somebody else's failure, which the watchdog then names
            self.watchdog.fail(str(error), 2 if isinstance(error, UserError) else 1)
            raise

    def _train(self) -> None:
        opening.announce(self.stage, self.engine, self.data_loader, self.state.step)
        if self.state.step == 0:
            self.recorder.note_start(self._expert_distance())
        while self.state.step < self.training.steps:
            losses, keys = self._accumulate()
            lr = learning_rate(self.training, self.engine.base_lr, self.state.step)
            self.watchdog.beat(self.state.step, "updating weights")
            result = self.engine.step(lr)
            self.state.step += 1
            self.state.samples_seen += self.engine.global_batch_size
            if self._skipped_or_rewound(result, losses, keys):
                continue
            self.watchdog.beat(self.state.step, "recording")
            self._record(result, lr)
            self._take_snapshot()
            if self._agree_to_stop():
                return self._leave()
            if self._validate():
                break
            self._save_and_draw()
        return self._finish()

    def _accumulate(self) -> tuple[Losses, list[str]]:
        """Forward and backward passes of a step's micro-batches: the last one's losses, but the mean `loss` and all tokens of
        the step, and the samples' keys."""
        keys: list[str] = []
        loss: Any = 0.0
        earlier: EarlierRouting | None = None
        self.expert_pictures.begin(self._is_drawn(self.state.step + 1))
        if self.teacher is not None:
            self.teacher.refresh(self.engine)
        for number in range(self.engine.accumulation):
            self.watchdog.beat(self.state.step, "reading data")
            begin = time.perf_counter()
            batch = next(self.batches)
            self.recorder.wait(time.perf_counter() - begin)
            self.watchdog.beat(self.state.step, "computing")
            keys += batch["key"]
            inputs = self.prepare(batch)
            with self.expert_pictures.watch(inputs):
                losses = Losses(*self.engine.accumulate(*inputs, earlier))
            self.recorder.sums.add(losses)
            loss = loss + losses.loss / self.engine.accumulation
            routing = (losses.tokens_per_expert, losses.router_probs)
            earlier = EarlierRouting(*routing) if earlier is None else earlier.plus(*routing)
            if number < self.engine.accumulation - 1:
                self.engine.end_micro_batch()
        assert earlier is not None
        return losses._replace(loss=loss, tokens_per_expert=earlier.tokens_per_expert), keys

    def _skipped_or_rewound(self, result: StepResult, losses: Losses, keys: list[str]) -> bool:
        """Balance the routers, or count a skipped step; True if too many of them rewound the run to its last checkpoint."""
        if result.applied:
            self.state.skipped_in_a_row = 0
            if self.config.model.router_bias_balancing:
                self.engine.module.network.update_router_bias(losses.tokens_per_expert)  # type: ignore[operator, union-attr]
            return False
        self.state.skipped += 1
        mean_loss = distributed.all_reduce_mean({"loss": float(losses.loss)})["loss"]
        scaler = self.engine.loss_scaler
        if scaler is not None and scaler.dynamic and math.isfinite(mean_loss):
            return False  # fp16 looks for the largest loss scale that does not overflow: no fault
        self.state.skipped_in_a_row += 1
        distributed.log(f"step {self.state.step}: loss or gradient not finite; the step is skipped on all ranks.")
        if self.state.skipped_in_a_row < self.training.max_skipped_steps:
            return False
        self._rewind(mean_loss, keys)
        return True

    def _record(self, result: StepResult, lr: float) -> None:
        begin = time.perf_counter()
        self.recorder.note(self._expert_distance())
        self.recorder.pause(time.perf_counter() - begin)
        counts = {"skipped_steps": self.state.skipped, "samples_seen": self.state.samples_seen}
        self.recorder.step_done(self.state.step, result, lr, **counts, skipped_samples=self.state.skipped_samples.count)

    def _expert_distance(self) -> dict[str, float]:
        """How different experts are, mean over layers, at the steps where that is measured. Collective."""
        every = self.training.expert_distance_every
        if not every or (self.state.step % every and self.state.step != self.training.steps):
            return {}
        return {"experts/distance": float(expert_distances(self.engine.module.network, gathered).mean())}  # type: ignore[arg-type]

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop; concludes what all ranks have written."""
        flags = self.control.agree(stop=bool(self.control.signal), busy=self.saver.busy)
        if self.saver.pending and not flags["busy"]:
            self.saver.finish()
        return flags["stop"] > 0

    def _validate(self) -> bool:
        """Score the averaged weights, if it is time to; whether the run ends here for want of a better score."""
        every = self.config.validation.every
        if self.validator is None or (self.state.step % every and self.state.step < self.training.steps):
            return False
        begin = time.perf_counter()
        alive = partial(self.watchdog.beat, self.state.step, "validating")
        alive()
        figures = self.validator(averaged_network(self.engine, self.config), alive)
        self.tracking.log_metrics({f"validation/{name}": value for name, value in figures.items()}, self.state.step)
        value, patience = figures[self.validator.metric], self.config.validation.patience
        self.state.best = self.state.best.after(self.state.step, value, self.validator, patience=patience)
        if self.state.best.step == self.state.step and self.config.validation.keep_best:
            export_averaged(self.engine, self.config, self._sections(), self.output_dir / BEST)
        seconds = time.perf_counter() - begin
        distributed.log(
            f"step {self.state.step}: validation {self.validator.metric} {with_unit(self.validator.metric, value)}, "
            f"best {with_unit(self.validator.metric, self.state.best.value)} at step {self.state.best.step}, {seconds:.1f} s"
        )
        self.recorder.pause(seconds)
        if self.state.best.stopped and self.state.step < self.training.steps:
            distributed.log(f"{self.state.best.misses} validations in a row were not better: the run ends here.")
        return self.state.best.stopped

    def _save_and_draw(self) -> None:
        begin = time.perf_counter()
        every = self.training.checkpoint_every
        if every and self.state.step % every == 0 and self.state.step < self.training.steps:
            self._save()
        if self._is_drawn(self.state.step) and self.state.step < self.training.steps:
            self._draw()
        self.recorder.pause(time.perf_counter() - begin)

    def _is_drawn(self, step: int) -> bool:
        every = self.config.sampling.every
        return step == self.training.steps or (every > 0 and step % every == 0)

    # --- states ---------------------------------------------------------------------------------------------------------

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        check_network(checkpoint, state, self.recipe, parameter_shapes(self.engine.module))
        restore(self.engine, checkpoint, state)
        self.state = RunState.of(state)
        for sentence in remarks(checkpoint, state, self.recipe, self.data_loader.data_sha256):
            distributed.log(sentence)

    def _open_data_loader(self) -> None:
        """Begin to read at `position`."""
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
        self.batches = iter(self.data_loader.stream)

    def _open_recorder(self) -> None:
        self.recorder = opening.open_recorder(
            self.recipe, self.engine, self.tracking, self.macs, self.output_dir, self.state.step
        )

    def _take_snapshot(self) -> None:
        begin = time.perf_counter()
        self.saver.take_snapshot(self.engine, self.state.step)
        self.recorder.pause(time.perf_counter() - begin)

    def _save(self) -> None:
        self.watchdog.beat(self.state.step, "saving")
        self.saver.begin(self.engine, self.state.step, self.state.for_checkpoint(self.stage, self._sections()))

    def _sections(self) -> dict[str, Any]:
        """What weights of this moment say of themselves."""
        return self.state.for_weights(self.stage, self.data_loader, self.macs.training)

    def _rewind(self, loss: float, keys: list[str]) -> None:
        """After too many skipped steps in a row: rewind to a checkpoint, once to each, and go on behind what led here."""
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

    # --- ends --------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        """Routing, if there are experts; class samples, while pre-training."""
        self.expert_pictures.draw(self.state.step, self.tracking)
        if self.config.task != "class":
            return
        path = self.output_dir / "pictures" / f"classes_{self.state.step:08d}.png"
        if save_class_samples(self.engine, self.config, self.data_loader.vae, self.data_loader.latent_size, path):
            self.tracking.log_picture(path, "classes", self.state.step)
            distributed.log(f"Class samples: {path}")

    def _leave(self) -> None:
        """A signal asked for it: save and stop, to be continued by the same command."""
        self._save()
        if not self.saver.finish():
            raise TrainingFailed("the run was asked to stop, and its state could not be saved.")
        names = [name for name in distributed.gather_objects(self.control.signal) if name]
        distributed.log(f"Stopped at step {self.state.step} by {names[0]}; the same command continues.")
        self._close("KILLED")

    def _finish(self) -> None:
        """The last checkpoint, pictures and exported weights."""
        last = self.saver.folder / checkpoint_name(self.state.step)
        if self.saver.pending:
            self.saver.finish()
        self._save()  # in place of one of the same name, which cannot be whole: the run would not have got here
        if not self.saver.finish():
            raise TrainingFailed("the last checkpoint could not be written; make room and start the same command again.")
        self._draw()
        weights = self.output_dir / WEIGHTS
        if distributed.is_main():
            export(last, weights)
            distributed.log(f"Weights: {weights}")
            if name := self.config.tracking.registered_model:
                self.tracking.register_model(weights, name, {"dpt.stage": self.stage.name, "dpt.task": self.config.task})
        distributed.barrier()
        self._close("FINISHED")

    def _close(self, status: str) -> None:
        self.batches.close()  # type: ignore[attr-defined]
        self.watchdog.close()
        self.control.unlisten()
        self.node_watch.finish()
        self.tracking.finish(status)
