"""The training loop that all stages share."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

from dpt import distributed
from dpt.config.recipe import Recipe
from dpt.errors import UserError
from dpt.locking import held
from dpt.models.expert_distance import expert_distances
from dpt.models.moe import EarlierRouting
from dpt.scores import with_unit
from dpt.training.checkpoint import checkpoint_name
from dpt.training.continuing import check_course
from dpt.training.deepspeed_internals import gathered
from dpt.training.engine import StepResult
from dpt.training.export import export
from dpt.training.failure import TrainingFailed
from dpt.training.optimizer import learning_rate
from dpt.training.outputs import BEST, CHECKPOINTS, WEIGHTS, exported_step
from dpt.training.resume import find_checkpoint
from dpt.training.sampling import averaged_network, save_class_samples
from dpt.training.session import Session
from dpt.training.step import Losses
from dpt.training.validation import Best, OpenValidator, export_averaged


def train(recipe: Recipe, stage_name: str, open_validator: OpenValidator | None = None) -> None:
    """Run a stage from its start, or its newest checkpoint, to exported weights. Raises UserError and TrainingFailed.

    `open_validator`: makes the scorer of networks for `dpt.validation`.
    """
    training, output_dir = recipe.dpt.training, Path(recipe.dpt.training.output_dir)
    with held(output_dir):
        found = find_checkpoint(output_dir / CHECKPOINTS, resume=training.resume)
        if found is not None:
            with distributed.shared_errors():
                check_course(*found, recipe, stage_name)
        if found is None or (found[1]["step"] < training.steps and not Best.of(found[1]).stopped):
            Trainer(recipe, stage_name, found, open_validator).run()
            return
        weights = output_dir / WEIGHTS
        with distributed.shared_errors():
            if distributed.is_main() and exported_step(weights) != found[1]["step"]:
                export(found[0], weights)
        distributed.log(f"{found[0]} is of the last step already; weights: {weights}")


class Trainer(Session):
    """The course of a run, step by step."""

    def run(self) -> None:
        """Train to the last step (or a signal), checkpoint, and export. Raises TrainingFailed."""
        try:
            self._train()
        except TrainingFailed:  # on all ranks together
            self.close("FAILED")
            raise
        except Exception as error:
            if not isinstance(error, UserError):
                time.sleep(3.0)  # a lost connection is another rank's failure, which the watchdog names
            self.watchdog.fail(str(error), 2 if isinstance(error, UserError) else 1)
            raise

    def _train(self) -> None:
        self.announce()
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
            with self.recorder.paused():
                self.saver.take_snapshot(self.engine, self.state.step)
            if self._agree_to_stop():
                return self._leave()
            with self.recorder.paused():
                if self._validate():
                    break
                self._save_and_draw()
        return self._finish()

    def _accumulate(self) -> tuple[Losses, list[str]]:
        """Run the forward and backward passes of a step's micro-batches; return the last one's losses, but with the mean `loss`
        and all tokens of the step, and the samples' keys."""
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
            return False  # fp16's search for the largest loss scale without overflow: not a fault
        self.state.skipped_in_a_row += 1
        distributed.log(f"step {self.state.step}: loss or gradient not finite; the step is skipped on all ranks.")
        if self.state.skipped_in_a_row < self.training.max_skipped_steps:
            return False
        self.rewind(mean_loss, keys)
        return True

    def _record(self, result: StepResult, lr: float) -> None:
        with self.recorder.paused():
            self.recorder.note(self._expert_distance())
        counts = {"skipped_steps": self.state.skipped, "samples_seen": self.state.samples_seen}
        self.recorder.step_done(self.state.step, result, lr, **counts, skipped_samples=self.state.skipped_samples.count)

    def _expert_distance(self) -> dict[str, float]:
        """Mean expert distance over layers, at the steps where it is measured. Collective."""
        every = self.training.expert_distance_every
        if not every or (self.state.step % every and self.state.step != self.training.steps):
            return {}
        return {"experts/distance": float(expert_distances(self.engine.module.network, gathered).mean())}  # type: ignore[arg-type]

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop; also completes a checkpoint that all ranks have written."""
        flags = self.control.agree(stop=bool(self.control.signal), busy=self.saver.busy)
        if self.saver.pending and not flags["busy"]:
            self.saver.finish()
        return flags["stop"] > 0

    def _validate(self) -> bool:
        """Score the averaged weights if due; return whether the run ends here for lack of a better score."""
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
            export_averaged(self.engine, self.config, self.sections(), self.output_dir / BEST)
        distributed.log(
            f"step {self.state.step}: validation {self.validator.metric} {with_unit(self.validator.metric, value)}, best "
            f"{with_unit(self.validator.metric, self.state.best.value)} at step {self.state.best.step}, "
            f"{time.perf_counter() - begin:.1f} s"
        )
        if self.state.best.stopped and self.state.step < self.training.steps:
            distributed.log(f"{self.state.best.misses} validations in a row were not better: the run ends here.")
        return self.state.best.stopped

    def _save_and_draw(self) -> None:
        """Save and draw whatever is due after any step but the last."""
        every, step = self.training.checkpoint_every, self.state.step
        if step == self.training.steps:
            return
        if every and step % every == 0:
            self.save()
        if self._is_drawn(step):
            self._draw()

    def _is_drawn(self, step: int) -> bool:
        every = self.config.sampling.every
        return step == self.training.steps or (every > 0 and step % every == 0)

    def _draw(self) -> None:
        """Draw routing, if there are experts, and class samples while pre-training."""
        self.expert_pictures.draw(self.state.step, self.tracking)
        if self.config.task != "class":
            return
        path = self.output_dir / "pictures" / f"classes_{self.state.step:08d}.png"
        if save_class_samples(self.engine, self.config, self.data_loader.vae, self.data_loader.latent_size, path):
            self.tracking.log_picture(path, "classes", self.state.step)
            distributed.log(f"Class samples: {path}")

    def _leave(self) -> None:
        """Save after a stop signal, so that the same command can resume the run."""
        self.save()
        if not self.saver.finish():
            raise TrainingFailed("the run was asked to stop, and its state could not be saved.")
        names = [name for name in distributed.gather_objects(self.control.signal) if name]
        distributed.log(f"Stopped at step {self.state.step} by {names[0]}; the same command continues.")
        self.close("KILLED")

    def _finish(self) -> None:
        """Write the last checkpoint, pictures and exported weights."""
        last = self.saver.folder / checkpoint_name(self.state.step)
        if self.saver.pending:
            self.saver.finish()
        self.save()  # replaces one of this name, which cannot be complete, or the run would not be here
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
        self.close("FINISHED")
