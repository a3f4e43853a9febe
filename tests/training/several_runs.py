"""Several training runs in one set of processes, for tests: started by a launcher with the path of a JSON list of runs.

A run: {"stage", "recipe" (path), "fields" (dotted name -> value), and what shall happen to it: "sigterm_at" (step at which
the last rank gets the signal; -1: none), "poison" (steps in whose first micro-batch the last rank's latents are not a
number)}. How each ended goes to LIST.results.json. No pictures are drawn: a VAE takes longer to load than these runs take.
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
    from dpt.training.loop import Trainer, _find_checkpoint

    last = distributed.rank() == distributed.world_size() - 1
    try:
        recipe = load_recipe(run["recipe"], run["fields"])
        found = _find_checkpoint(Path(recipe.dpt.training.output_dir) / "checkpoints", resume=True)
        trainer = Trainer(recipe, run["stage"], found)
        step_done, prepare, micro_batches = trainer.recorder.step_done, trainer.prepare, itertools.count()

        def observed(step: int, *rest: Any, **more: Any) -> None:
            if last and step == run["sigterm_at"]:
                os.kill(os.getpid(), signal.SIGTERM)
            step_done(step, *rest, **more)

        def poisoned(batch: dict[str, Any]) -> Any:
            inputs = prepare(batch)
            first = next(micro_batches) % trainer.engine.accumulation == 0
            bad = last and first and trainer.step in run["poison"]
            return inputs._replace(latents=inputs.latents * float("nan")) if bad else inputs

        trainer.recorder.step_done, trainer.prepare = observed, poisoned  # type: ignore[method-assign, assignment]
        trainer._draw = lambda: None  # type: ignore[method-assign]
        trainer.run()
    except TrainingFailed as error:
        return str(error)
    except UserError as error:
        return str(error)
    return "stopped" if trainer.step < trainer.training.steps else "finished"


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--"))))
