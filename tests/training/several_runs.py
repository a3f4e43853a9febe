"""Several training runs in one set of processes, for tests: started by a launcher with the path of a JSON list of runs.

A run: {"stage", "recipe" (path), "fields" (dotted name -> value), and what shall happen to it: "sigterm_at" (step at which
the last rank gets the signal; -1: none), "poison" (steps in whose first micro-batch the last rank's latents are not a
number), "poisoned_samples" (positions in the stream whose batches are not numbers), "damage" (whether the newest checkpoint is
damaged before)}. How each ended goes to LIST.results.json, tags for MLflow to the run's tags.json. No pictures are drawn: a VAE
takes longer to load than these runs take.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from dpt import distributed


def main(path: Path) -> None:
    distributed.init(timeout_s=300)
    import deepspeed

    from dpt.training import loop

    loop.measure_peak_flops = lambda *_: 1e12  # the same for all runs, and known
    loop.Watchdog.__init__.__kwdefaults__["interval_s"] = 0.1  # type: ignore[index]
    deepspeed.get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but the same mathematics
    results = []
    for run in json.loads(path.read_text()):
        results.append(train(run))
        if distributed.is_main():
            path.with_suffix(".results.json").write_text(json.dumps(results))
    distributed.shutdown()


def train(run: dict[str, Any]) -> str:
    """ "finished", "stopped" (by the signal), or the report of a failure or refusal."""
    from dpt.config.recipe import load_recipe
    from dpt.errors import UserError
    from dpt.training.failure import TrainingFailed
    from dpt.training.loop import Trainer
    from dpt.training.resume import find_checkpoint

    last = distributed.rank() == distributed.world_size() - 1
    try:
        recipe = load_recipe(run["recipe"], run["fields"])
        checkpoints = Path(recipe.dpt.training.output_dir) / "checkpoints"
        if run["damage"]:
            damage_newest(checkpoints)
        trainer = Trainer(recipe, run["stage"], find_checkpoint(checkpoints, resume=True))
        agree_to_stop, prepare, micro_batches = trainer._agree_to_stop, trainer.prepare, itertools.count()

        def asked_to_stop() -> bool:
            if last and trainer.step == run["sigterm_at"]:
                os.kill(os.getpid(), signal.SIGTERM)
            return agree_to_stop()

        def poisoned(batch: dict[str, Any]) -> Any:
            inputs = prepare(batch)
            first = next(micro_batches) % trainer.engine.accumulation == 0
            bad = last and first and trainer.step in run["poison"]
            bad = bad or not set(run["poisoned_samples"]).isdisjoint(batch["sample_index"].tolist())
            return inputs._replace(latents=inputs.latents * float("nan")) if bad else inputs

        trainer._agree_to_stop, trainer.prepare = asked_to_stop, poisoned  # type: ignore[method-assign, assignment]
        tags = checkpoints.parent / "tags.json"
        trainer.tracking.set_tags = lambda values: tags.write_text(json.dumps(values))  # type: ignore[method-assign, assignment]
        trainer._draw = lambda: None  # type: ignore[method-assign]
        trainer.run()
    except TrainingFailed as error:
        return str(error)
    except UserError as error:
        return str(error)
    return "stopped" if trainer.step < trainer.training.steps else "finished"


def damage_newest(checkpoints: Path) -> None:
    """Change a bit in the first file of the newest checkpoint."""
    from dpt.training.checkpoint import find_checkpoints, rank_file

    if distributed.is_main():
        path = find_checkpoints(checkpoints)[0] / rank_file(0)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    distributed.barrier()


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--"))))
