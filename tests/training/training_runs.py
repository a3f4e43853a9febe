"""Several training runs in the same processes, for tests: processes take longer to start than such runs."""

import itertools
import json
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_toys import MOE, make_recipe, make_shards, records

from dpt import distributed
from dpt.commands.training import open_validator
from dpt.config.recipe import load_recipe
from dpt.errors import UserError
from dpt.training.checkpoint import find_checkpoints, rank_file, read_state
from tests.gloo import run_ranks

STEPS = 12
"""Of a run, at 8 samples each."""

ACCUMULATED = {"train_micro_batch_size_per_gpu": 2, "training.balance_loss_weight": 0.0}
BIASES = {"model.router_bias_balancing": True, "model.router_gate": "sigmoid", "training.router_z_loss_weight": 0.0}
BF16 = {"bf16.enabled": True}


def zero(stage: int, *more: dict[str, Any]) -> dict[str, Any]:
    """Fields of a ZeRO stage, and `more`."""
    fields: dict[str, Any] = {"zero_optimization.stage": stage}
    for part in more:
        fields |= part
    return fields


def ep(stage: int, ep_size: int, *more: dict[str, Any]) -> dict[str, Any]:
    """Fields of a network with experts that are spread over `ep_size` ranks."""
    return zero(stage, MOE, {"training.ep_size": ep_size}, *more)


@dataclass(frozen=True, kw_only=True)
class ToyRun:
    """A run, and what shall happen to it."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    stage: str = "pretrain"
    ends: str | None = ""
    """How it must end; empty: "stopped" if by the signal, else "finished"; None: anyhow."""
    slow: bool = False
    """Whether only slow tests look at it."""
    sigterm_at: int = -1
    """Step at which the last rank gets the signal; -1: none."""
    poison: Sequence[int] = ()
    """Steps in whose first micro-batch the last rank's latents are not a number."""
    poisoned_samples: Sequence[int] = ()
    """Positions in the stream whose batches are not numbers."""
    damage: bool = False
    """Whether its newest checkpoint is damaged before."""


def interrupted(name: str, fields: Mapping[str, Any], *stops: int, **more: Any) -> list[ToyRun]:
    """A run that the signal stops after each of these steps, and that is resumed to its end."""
    return [ToyRun(name=name, fields=fields, sigterm_at=step, **more) for step in (*stops, -1)]


class Runs:
    """Runs of one toy recipe: `runs(NAME)` is the output folder of the run NAME. No pictures are drawn: a VAE takes longer to
    load than these runs take. Tags for MLflow go to the run's tags.json."""

    def __init__(self, folder: Path, *, slow: bool) -> None:
        self.folder, self.slow = folder, slow
        self.ended: dict[str, list[str]] = defaultdict(list)
        """How each run ended, by name, each time that it was started: "finished", "stopped", or the report of a failure or
        refusal."""
        self.recipe = make_recipe(folder / "recipe.json", [make_shards(folder / "shards")], steps=STEPS)

    def __call__(self, name: str) -> Path:
        return self.folder / name

    def records(self, name: str) -> list[dict[str, float]]:
        """The run's records, by step."""
        return records(self(name))

    def history(self, name: str, metric: str = "train/loss") -> list[float]:
        """A metric at every step."""
        return [record[metric] for record in self.records(name)]

    def checkpoint(self, name: str) -> Path:
        """The run's newest checkpoint."""
        return find_checkpoints(self(name) / "checkpoints")[0]

    def state(self, name: str) -> dict[str, Any]:
        """What that says."""
        return read_state(self.checkpoint(name))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All that it holds, by file and name."""
        files = sorted(self.checkpoint(name).glob("*.safetensors"))
        return {f"{file.name} {key}": tensor for file in files for key, tensor in load_file(file).items()}

    def weights(self, name: str) -> dict[str, Tensor]:
        """What it exported: plain, and averaged under the prefix "ema."."""
        return load_file(self(name) / "weights" / "weights.safetensors")

    def check_equal(self, name: str, other: str, *metrics: str) -> None:
        """AssertionError unless both runs came to the same bit for bit, and recorded the same `metrics`."""
        found, expected = self.tensors(name), self.tensors(other)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key
        for metric in metrics:
            assert self.history(name, metric) == self.history(other, metric), metric

    def check_close(self, name: str, other: str, *metrics: str, rel: float) -> None:
        """AssertionError unless both runs recorded nearly the same `metrics`, those being numbers."""
        for metric in metrics or ("train/loss",):
            assert self.history(name, metric) == pytest.approx(self.history(other, metric), rel=rel), metric

    def train(self, ranks: int, *runs: ToyRun) -> None:
        """Do the runs one after the other on `ranks` ranks, but for slow ones that are not asked for."""
        wanted = [run for run in runs if self.slow or not run.slow]
        ended = run_ranks(ranks, self._train_all, wanted, timeout_s=1200.0, as_launched=True)[0]
        for run, end in zip(wanted, ended, strict=True):
            self.ended[run.name].append(end)
            due = ("finished" if run.sigterm_at < 0 else "stopped") if run.ends == "" else run.ends
            assert due in (None, end), f"{run.name}: {end}"

    def _train_all(self, runs: Sequence[ToyRun]) -> list[str]:
        import deepspeed

        from dpt.training import records as recording
        from dpt.training import watchdog

        recording.measure_peak_flops = lambda *_: 1e12  # the same for all runs, and known
        watchdog.Watchdog.__init__.__kwdefaults__["interval_s"] = 0.1  # type: ignore[index]
        deepspeed.get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but the same mathematics
        return [self._train(run) for run in runs]

    def _train(self, run: ToyRun) -> str:
        from dpt.training.failure import TrainingFailed
        from dpt.training.loop import Trainer
        from dpt.training.resume import find_checkpoint

        output = self.folder / run.name
        try:
            recipe = load_recipe(self.recipe, {**run.fields, "training.output_dir": str(output)})
            if run.damage:
                damage_newest(output / "checkpoints")
            found = find_checkpoint(output / "checkpoints", resume=True)
            trainer = Trainer(recipe, run.stage, found, open_validator)
            trainer._agree_to_stop = _signalled(trainer, run)  # type: ignore[method-assign]
            trainer.prepare = _poisoned(trainer, run)  # type: ignore[assignment]
            tags = output / "tags.json"
            trainer.tracking.set_tags = lambda values: tags.write_text(json.dumps(values))  # type: ignore[method-assign, assignment]
            trainer._draw = lambda: None  # type: ignore[method-assign]
            trainer.run()
        except (TrainingFailed, UserError) as error:
            return str(error)
        return "stopped" if trainer.state.step < trainer.training.steps else "finished"


def _is_last() -> bool:
    return distributed.rank() == distributed.world_size() - 1


def _signalled(trainer: Any, run: ToyRun) -> Callable[[], bool]:
    agree_to_stop = trainer._agree_to_stop

    def asked_to_stop() -> bool:
        if _is_last() and trainer.state.step == run.sigterm_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return agree_to_stop()

    return asked_to_stop


def _poisoned(trainer: Any, run: ToyRun) -> Callable[[dict[str, Any]], Any]:
    prepare, micro_batches = trainer.prepare, itertools.count()

    def poisoned(batch: dict[str, Any]) -> Any:
        inputs = prepare(batch)
        first = next(micro_batches) % trainer.engine.accumulation == 0
        bad = _is_last() and first and trainer.state.step in run.poison
        bad = bad or not set(run.poisoned_samples).isdisjoint(batch["sample_index"].tolist())
        return inputs._replace(latents=inputs.latents * float("nan")) if bad else inputs

    return poisoned


def damage_newest(checkpoints: Path) -> None:
    """Change a bit in the first file of the newest checkpoint."""
    if distributed.is_main():
        path = find_checkpoints(checkpoints)[0] / rank_file(0)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    distributed.barrier()


def marked(slow: set[str], name: str, *values: object) -> object:
    """A parameter set (`name` unless given), marked slow if the run `name` is."""
    return pytest.param(*(values or (name,)), marks=[pytest.mark.slow] if name in slow else [], id=name)
