"""The training loop that all stages share."""

import json
import math
import time
from pathlib import Path
from typing import Any

from dpt import __version__, distributed
from dpt.config.recipe import Recipe
from dpt.data.codec import VAECodec, load_vae
from dpt.errors import UserError
from dpt.models.costs import macs, num_params
from dpt.tracking import Run, start_run
from dpt.training.checkpoint import find_checkpoints, newest_checkpoint, restore
from dpt.training.control import Control
from dpt.training.engine import Engine, StepResult
from dpt.training.export import export, weights_sections
from dpt.training.feed import Feed, open_feed
from dpt.training.fragments import fragments, gather_weights
from dpt.training.optimizer import learning_rate
from dpt.training.records import Recorder, measure_peak_flops
from dpt.training.sampling import draw_classes
from dpt.training.saving import Saver
from dpt.training.stages import open_stage
from dpt.training.step import Losses, LossModule, Preparation
from dpt.training.watchdog import Watchdog


class TrainingFailed(Exception):
    """Training cannot go on; the text is the report."""


class Trainer:
    """One run of a stage, from its start or its newest checkpoint to exported weights."""

    def __init__(self, recipe: Recipe, stage_name: str) -> None:
        self.training = recipe.dpt.training
        self.output_dir = Path(self.training.output_dir)
        self.checkpoints = self.output_dir / "checkpoints"
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.rewound = False
        self.run_id = ""
        found = self._find_checkpoint()
        self.stage = open_stage(recipe, stage_name, parents=found[1]["parents"] if found else None)
        self.recipe, self.config = self.stage.recipe, self.stage.recipe.dpt
        self.engine = Engine(self.recipe, LossModule(self.stage.build(), self.config))
        self.stage.start = None  # the engine has them now
        self.control, self.watchdog = Control(), Watchdog(self.training.timeout_s)
        if found is not None:
            self._go_back(*found)
        self.feed = self._open_feed()
        self.prepare = Preparation(
            self.config,
            tasks=self.feed.tasks,
            scaling_factor=self.feed.vae.scaling_factor,
            device=self.engine.device,
            dtype=self.engine.dtype,
        )
        self.macs = macs(self.config.model, *self.feed.latent_size)
        self.saver = Saver(self.checkpoints, keep_last=self.training.keep_last, keep_every=self.training.keep_every)
        self.tracking = self._start_tracking()
        self.recorder = self._start_recorder()

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
        self.control.listen()
        self._announce()
        while self.step < self.training.steps:
            losses, keys = self._accumulate()
            lr = learning_rate(self.training, self.engine.base_lr, self.step)
            self.watchdog.beat(self.step, "updating weights")
            result = self.engine.step(lr)
            self.step += 1
            self._after_update(result, losses, keys)
            self.watchdog.beat(self.step, "recording")
            self.recorder.step_done(self.step, result, lr, self.skipped)
            if self._agree_to_stop():
                return self._leave()
            self._save_and_draw()
        return self._finish()

    def _accumulate(self) -> tuple[Losses, list[str]]:
        """Forward and backward passes of a step's micro-batches; the last one's losses, and all samples' keys."""
        keys: list[str] = []
        for number in range(self.engine.accumulation):
            self.watchdog.beat(self.step, "reading data")
            begin = time.perf_counter()
            batch = next(self.batches)
            self.recorder.wait(time.perf_counter() - begin)
            self.watchdog.beat(self.step, "computing")
            keys += batch["key"]
            losses = Losses(*self.engine.accumulate(*self.prepare(batch)))
            self.recorder.sums.add(losses)
            if number < self.engine.accumulation - 1:
                self.engine.end_micro_batch()
        return losses, keys

    def _after_update(self, result: StepResult, losses: Losses, keys: list[str]) -> None:
        """Balance the routers, or count a skipped step and decide whether to go back or give up."""
        if result.applied:
            self.skipped_in_a_row = 0
            if self.config.model.router_bias_balancing:
                self.engine.module.network.update_router_bias(losses.tokens_per_expert)  # type: ignore[operator, union-attr]
            return
        self.skipped += 1
        mean_loss = distributed.all_reduce_mean({"loss": float(losses.loss)})["loss"]
        scaler = self.engine.loss_scaler
        if scaler is not None and scaler.dynamic and math.isfinite(mean_loss):
            return  # fp16 looks for the largest loss scale that does not overflow: no fault
        self.skipped_in_a_row += 1
        distributed.log(f"step {self.step}: loss or gradient not finite; the step is skipped on all ranks.")
        if self.skipped_in_a_row >= self.training.max_skipped_steps:
            self._rewind(mean_loss, keys)

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop; concludes a checkpoint that all ranks have written."""
        flags = self.control.agree(stop=bool(self.control.signal), busy=self.saver.busy)
        if self.saver.pending and not flags["busy"]:
            self.saver.finish()
        return flags["stop"] > 0

    def _save_and_draw(self) -> None:
        begin = time.perf_counter()
        every, pictures_every = self.training.checkpoint_every, self.config.sampling.every
        if every and self.step % every == 0 and self.step < self.training.steps:
            self._save()
        if pictures_every and self.step % pictures_every == 0 and self.step < self.training.steps:
            self._draw()
        self.recorder.pause(time.perf_counter() - begin)

    # --- states ---------------------------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        if self.training.resume:
            return newest_checkpoint(self.checkpoints)
        if find_checkpoints(self.checkpoints):
            raise UserError(
                f"{self.checkpoints} holds checkpoints of an earlier run, and dpt.training.resume is false; "
                "set it to true, or choose another dpt.training.output_dir."
            )
        return None

    def _go_back(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        if state["recipe"]["dpt"]["model"] != self.recipe.to_dict()["dpt"]["model"]:
            raise UserError(
                f"{checkpoint} is of another network than dpt.model; choose another dpt.training.output_dir, or set "
                "dpt.training.weights to start from it."
            )
        restore(self.engine, checkpoint, state)
        self.step, self.skipped, self.run_id = state["step"], state["skipped"], state["run_id"]
        distributed.log(f"Continuing from {checkpoint} (step {self.step}, written on {state['layout']['world_size']} ranks).")

    def _open_feed(self) -> Feed:
        feed = open_feed(
            self.config,
            global_batch_size=self.engine.global_batch_size,
            micro_batch_size=self.engine.micro_batch_size,
            start_sample=self.step * self.engine.global_batch_size,
            pin_memory=self.engine.device.type == "cuda",
        )
        self.batches = iter(feed.stream)
        return feed

    def _save(self) -> None:
        self.watchdog.beat(self.step, "saving")
        self.saver.begin(self.engine, self.step, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "parents": self.stage.parents,
            "samples_seen": self.step * self.engine.global_batch_size,
            "skipped": self.skipped,
            "run_id": self.run_id,
            "layout": {
                "world_size": distributed.world_size(),
                "ep_size": self.training.ep_size,
                "zero_stage": self.recipe.zero_stage,
                "precision": self.recipe.precision,
            },
            "recipe": self.recipe.to_dict(),
            "sections": weights_sections(self.config, self.feed.vae, self._lineage()),
            "dpt_version": __version__,
        }

    def _lineage(self) -> dict[str, Any]:
        samples = self.step * self.engine.global_batch_size
        return {
            "run_id": self.run_id,
            "parents": self.stage.parents,
            "train_macs": self.macs.training * samples,
            "data_sha256": self.feed.data_sha256,
            "samples_seen": samples,
            "step": self.step,
        }

    def _rewind(self, loss: float, keys: list[str]) -> None:
        """After too many skipped steps in a row: back to the last checkpoint once, then stop with a report."""
        if self.saver.pending:
            self.saver.finish()
        found = None if self.rewound else newest_checkpoint(self.checkpoints)
        if found is None:
            raise TrainingFailed(self._report(loss, keys))
        self._go_back(*found)
        self.rewound, self.skipped_in_a_row = True, 0
        self.feed = self._open_feed()
        self.recorder = self._start_recorder()

    def _report(self, loss: float, keys: list[str]) -> str:
        """What is known of a failure, also written to `failure.json`. Collective."""
        squares = {f.name: float(f.master().double().square().sum()) for f in fragments(self.engine.deepspeed) if f.owned}
        names = sorted({name for part in distributed.gather_objects(sorted(squares)) for name in part})
        norms = distributed.all_reduce_sum({name: squares.get(name, 0.0) for name in names})
        largest = sorted(norms, key=lambda n: -norms[n] if math.isfinite(norms[n]) else -math.inf)[:8]
        report = {
            "step": self.step,
            "loss": loss,
            "skipped_in_a_row": self.skipped_in_a_row,
            "largest_weight_norms": {name: math.sqrt(norms[name]) for name in largest},
            "sample_keys": [key for part in distributed.gather_objects(keys) for key in part],
        }
        path = self.output_dir / "failure.json"
        if distributed.is_main():
            path.write_text(json.dumps(report, indent=1), encoding="utf-8")
        again = "also after going back to the last checkpoint" if self.rewound else "and there is no checkpoint to go back to"
        return (
            f"{self.skipped_in_a_row} steps in a row up to step {self.step} were not finite (loss {loss}), {again}. Largest "
            f"weight norms: {', '.join(f'{n} {math.sqrt(norms[n]):.3g}' for n in largest[:3])}. Sample keys and more: {path}"
        )

    # --- beginnings and ends --------------------------------------------------------------------------------------------

    def _start_tracking(self) -> Run:
        resumed, past = (self.run_id or None), (self.step if self.step else -1)
        run = start_run(
            self.config.tracking,
            stage=self.stage.name,
            name=f"{self.stage.name} {self.config.task} {self.config.model.preset}",
            params=self.recipe.to_dict(),
            parents=self.stage.parents,
            output_dir=self.output_dir,
            tags={"dpt.data_sha256": self.feed.data_sha256, "dpt.ranks": str(distributed.world_size())},
            resume_run_id=resumed,
            past_step=past,
        )
        self.run_id = distributed.broadcast_object(run.run_id)
        return run

    def _start_recorder(self) -> Recorder:
        return Recorder(
            self.output_dir,
            self.tracking,
            step=self.step,
            steps=self.training.steps,
            every=self.training.log_every,
            global_batch_size=self.engine.global_batch_size,
            macs={"forward": self.macs.forward, "training": self.macs.training},
            peak_flops=measure_peak_flops(self.engine.device, self.engine.dtype),
            dense=self.config.model.num_experts == 0,
        )

    def _announce(self) -> None:
        engine, ranks, params = self.engine, distributed.world_size(), num_params(self.config.model)
        distributed.log(
            f"{self.stage.name}: {self.config.task}, {params.total / 1e6:.2f}M parameters ({params.active / 1e6:.2f}M active), "
            f"{ranks} rank{'s' * (ranks > 1)} on {engine.device.type}, {self.recipe.precision}, ZeRO {self.recipe.zero_stage}, "
            f"batch {engine.global_batch_size} = {engine.micro_batch_size} x {engine.accumulation} micro-batches x {ranks}, "
            f"{self.feed.stream.num_samples} samples, steps {self.step} to {self.training.steps}."
        )

    def _draw(self) -> None:
        """Class samples of the averaged weights, from rank 0."""
        if self.config.task != "class":
            return
        state = next(iter(self.engine.optimizer.ema_decays), "master")
        weights = gather_weights(self.engine.deepspeed, self.engine.optimizer, state)
        if distributed.is_main():
            path = self.output_dir / "pictures" / f"classes_{self.step:08d}.png"
            try:
                vae = self._vae()
                draw_classes(self.config, weights, vae, path, device=self.engine.device, size=self.feed.latent_size)
                self.tracking.log_picture(path, "classes", self.step)
                distributed.log(f"Class samples: {path}")
            except UserError as error:
                distributed.log(f"No class samples were drawn: {error}")
        distributed.barrier()

    def _vae(self) -> VAECodec:
        vae = load_vae(self.config.data.vae, latent_channels=self.config.model.in_channels).to(self.engine.device)
        if vae.sha256 != self.feed.vae.sha256:
            raise UserError(
                f'dpt.data.vae "{self.config.data.vae}" is not the VAE "{self.feed.vae.name}" that made the shards; set it.'
            )
        return vae

    def _leave(self) -> None:
        """A signal asked for it: save and stop, to be continued by the same command."""
        self._save()
        if not self.saver.finish():
            raise TrainingFailed("the run was asked to stop, and its state could not be saved.")
        names = [name for name in distributed.gather_objects(self.control.signal) if name]
        distributed.log(f"Stopped at step {self.step} by {names[0]}; the same command continues.")
        self._close("KILLED")

    def _finish(self) -> None:
        """The last checkpoint, pictures and exported weights."""
        last = self.checkpoints / f"step_{self.step:08d}"
        if self.saver.pending:
            self.saver.finish()
        if not last.exists():
            self._save()
            if not self.saver.finish():
                raise TrainingFailed("the last checkpoint could not be written; make room and start the same command again.")
            self._draw()
        weights = self.output_dir / "weights"
        if distributed.is_main():
            export(last, weights)
            distributed.log(f"Weights: {weights}")
        distributed.barrier()
        self._close("FINISHED")

    def _close(self, status: str) -> None:
        self.batches.close()  # type: ignore[attr-defined]
        self.watchdog.close()
        self.control.unlisten()
        self.tracking.finish(status)
