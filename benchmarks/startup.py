"""How long users wait before anything happens: `import dpt`, `dpt --help`, and a launcher's first training step.

python -m benchmarks.startup [--preset a1] [--batch 16] [--json FILE]

`bound`: for the first two the bare interpreter; for the first step, loading torch and DeepSpeed in an interpreter that does
nothing else. The first step counts from the command to the line that reports it, checks, shards and tracking included.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.loader import write_shards

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"import dpt": 0.3, "dpt --help": 0.5, "first step": 15.0}
"""Seconds that each may take."""


def command(*words: str) -> Callable[[], None]:
    """An action that runs a command of this interpreter to its end."""
    environment = os.environ | ({} if harness.torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})

    def action() -> None:
        subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)

    return action


def write_recipe(folder: Path, preset: str, batch: int) -> Path:
    """A recipe for one step, with shards for it."""
    shards = folder / "shards"
    shards.mkdir()
    write_shards(shards, megabytes=1)
    model = {"preset": preset, "input_size": 32}
    training = {"output_dir": str(folder / "run"), "steps": 1, "checkpoint_every": 0}
    dpt = {
        "task": "class", "model": model, "data": {"shards": [str(shards)], "vae": "none"}, "training": training,
        "sampling": {"num_inference_steps": 1, "labels": [0]}, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }  # fmt: skip
    path = folder / "recipe.json"
    path.write_text(json.dumps({"train_batch_size": batch, "zero_optimization": {"stage": 1}, "dpt": dpt}))
    return path


def first_step(folder: Path, recipe: Path) -> Callable[[], None]:
    """An action that runs the launcher until it reports its first step, then ends it."""

    def action() -> None:
        words = [sys.executable, "launchers/pretrain.py", "--ds_config", str(recipe)]
        words += ["--training.output_dir", tempfile.mkdtemp(dir=folder)]
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if line.startswith("step 1/"):
                    break
            else:
                raise RuntimeError("the launcher ended without a step:\n" + "".join(said))
            process.kill()

    return action


def measure(preset: str, batch: int, rounds: int) -> list[harness.Row]:
    """Measure all three, each in turn with its bound."""
    with tempfile.TemporaryDirectory(prefix="dpt-startup-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        recipe = write_recipe(folder, preset, batch)
        bare, libraries = command("-c", "pass"), command("-c", "import torch, deepspeed")
        actions = {
            "import dpt": (command("-c", "import dpt"), bare),
            "dpt --help": (command("-m", "dpt.cli", "--help"), bare),
            "first step": (first_step(folder, recipe), libraries),
        }
        results = []
        for case, (action, bound) in actions.items():
            for row in harness.rows(case, harness.interleave({harness.BOUND: bound, harness.OURS: action}, rounds)):
                del row["processor_s"]  # the work is in other processes
                row.pop("share_of_bound_processor", None)
                results.append(row | ({"limit_s": LIMITS[case]} if row["what"] == harness.OURS else {}))
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, preset="a1", batch=16)
    arguments = parser.parse_args(argv)
    harness.finish("startup", measure(arguments.preset, arguments.batch, arguments.rounds), arguments)


if __name__ == "__main__":
    main()
