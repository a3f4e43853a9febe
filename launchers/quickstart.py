"""The whole road on one small machine: scenes -> latents -> pre-train -> fine-tune -> upcycle -> evaluate -> report.

Every step is a command that a user could type; it is shown, run, and skipped on the next call if its result is still there
and the command has not changed.
"""

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dpt.config.numbers import AT_LEAST_1, numeric
from dpt.config.parser import Parser
from dpt.errors import UserError, reported
from dpt.evaluation.summary import format_summary
from dpt.scaling.processes import LaunchProcess, start_forked, start_fresh
from dpt.scaling.report import format_table, results_table
from dpt.scaling.side_by_side import Running, run_side_by_side
from dpt.tracking.read import load_runs

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = "quickstart"
DEFAULT_OUT = "runs/quickstart"
STEPS, ENSEMBLE = 10, 5
SPLITS = "train=0.95,val=0.05"
ONE_STEP = "one_step"
MODELS = {  # label of the table's row -> folder of exported weights
    "untrained": "untrained",
    "fine-tuned after pre-training": "depth",
    "upcycled to experts": "upcycled",
    "trained to predict in one step": ONE_STEP,
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command, what it is for, the file that proves it finished, and the folder that holds all it makes."""

    title: str
    command: list[str]
    result: Path
    folder: Path
    needs: tuple[Path, ...] = ()
    """Results of earlier steps that it reads."""


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def launch(launcher: str, recipe: str, *fields: str) -> list[str]:
    """A launcher, one recipe, and the fields that differ; one process on the CPU needs no start-up time of DeepSpeed's own."""
    start = ["deepspeed", "--quiet"] if torch.cuda.is_available() else python()
    return [*start, f"launchers/{launcher}.py", "--ds_config", f"ds_configs/{recipe}.json", *fields]


def road(out: Path, scenes: int, uri: str) -> list[Step]:
    """The steps, in order. `uri`: of the MLflow store; empty: no tracking, and then no report."""
    shards, tracking = out / "shards", ["--tracking.uri", uri, "--tracking.experiment", EXPERIMENT]
    if not uri:
        tracking = ["--tracking.enabled", "false"]
    steps = [
        Step(
            title="synthesise textured, lit 3-D scenes with exact ground truth",
            command=python("-m", "data_tools.synthesis", "--out", f"{out}/scenes", "--scenes", str(scenes), "--splits", SPLITS),
            result=out / "scenes" / "synthesis.json",
            folder=out / "scenes",
        )
    ]
    rendered = steps[0].result
    depth = ["--dataset", "hypersim", "--root", f"{out}/scenes/hypersim", "--prompt", "none"]
    for name, arguments in {
        "class_train": ["--dataset", "imagenet", "--root", f"{out}/scenes/imagenet", "--split", "train"],
        "depth_train": [*depth, "--split", "train"],
        "depth_val": [*depth, "--split", "val", "--evaluation"],
    }.items():
        steps.append(
            Step(
                title=f"encode {name.replace('_', ', ')} into latent shards with the VAE",
                command=python(
                    "-m",
                    "data_tools.encode",
                    *arguments,
                    "--vae",
                    "embedded",
                    "--resolution",
                    "128",
                    "--out",
                    f"{shards}/{name}",
                ),
                result=shards / name / "manifest.json",
                folder=shards / name,
                needs=(rendered,),
            )
        )

    def elsewhere(field: str, name: str) -> list[str]:
        """The shards, where they are not those of the recipes."""
        return [] if out == Path(DEFAULT_OUT) else [field, f"{shards}/{name}"]

    def exported(name: str) -> Path:
        return out / name / "weights" / "config.json"

    def trained(name: str, title: str, launcher: str, recipe: str, *options: str, after: str = "") -> None:
        data = "class_train" if name == "pretrain" else "depth_train"
        fields = [*options, *(weights(after) if after else [])]
        fields += ["--output_dir", f"{out}/{name}", "--tracking.run_name", name, *tracking, *elsewhere("--data.shards", data)]
        needs = [shards / data / "manifest.json", *([exported(after)] if after else [])]
        command = launch(launcher, recipe, *fields)
        steps.append(Step(title=title, command=command, result=exported(name), folder=out / name, needs=tuple(needs)))

    def weights(name: str) -> list[str]:
        return ["--weights", f"{out}/{name}/weights"]

    trained("pretrain", "pre-train a class-conditional DiT", "pretrain", "quickstart")
    trained(ONE_STEP, "train for depth at the last timestep alone", "finetune", "quickstart_one_step")
    trained("depth", "fine-tune for depth after pre-training", "finetune", "quickstart_depth", after="pretrain")
    trained("upcycled", "upcycle to experts and train on", "upcycle", "quickstart_upcycle", after="depth")
    trained("untrained", "set up an untrained depth model", "finetune", "quickstart_depth", "--steps", "0")
    for label, name in MODELS.items():
        recipe, fields = "quickstart_depth", ["--steps", str(STEPS), "--ensemble", f"1,{ENSEMBLE}"]
        if name == ONE_STEP:
            recipe, fields = "quickstart_one_step", []
        fields += ["--output_dir", f"{out}/evaluate/{name}"]
        fields += elsewhere("--evaluation.data", "depth_val")
        naming = ["--tracking.run_name", f"evaluate {name}", "--tracking.tags", json.dumps({"dpt.label": label})]
        steps.append(
            Step(
                title=f"evaluate: {label}",
                command=launch("evaluate", recipe, *weights(name), *fields, *tracking, *naming),
                result=out / "evaluate" / name / "summary.json",
                folder=out / "evaluate" / name,
                needs=(exported(name), shards / "depth_val" / "manifest.json"),
            )
        )
    if not uri:
        return steps
    steps.append(
        Step(
            title="wait until every record has reached MLflow",
            command=python("-m", "dpt.cli", "sync", str(out)),
            result=out / "mlflow.db",
            folder=out / "sync",
            needs=tuple(out / "evaluate" / name / "summary.json" for name in MODELS.values()),
        )
    )
    steps.append(
        Step(
            title="write the report",
            command=python("-m", "dpt.cli", "report", EXPERIMENT, "--uri", uri, "--out", f"{out}/report/index.html"),
            result=out / "report" / "index.html",
            folder=out / "report",
            needs=(out / "mlflow.db",),
        )
    )
    return steps


def run_road(steps: list[Step], out: Path, jobs: int) -> None:
    """Run what is not done, `jobs` steps at a time, each on its share of the CPU threads; their output is kept in `out`/logs.

    A step waits for those whose results it reads. One whose command or recipe changed, and all that read what it makes, are
    done again; others continue. UserError if one fails: no further one starts then, and those that run beside it end first.
    """
    record = out / "commands.json"
    begun: dict[str, list[str]] = json.loads(record.read_text()) if record.exists() else {}
    numbers, done_again = {step.title: number for number, step in enumerate(steps, 1)}, set[Path]()

    def start(step: Step, slot: int, beside: int) -> LaunchProcess | None:
        head, identity = f"[{numbers[step.title]}/{len(steps)}] {step.title}", _identity(step)
        same = begun.get(step.title) == identity and not done_again.intersection(step.needs)
        if same and step.result.exists():
            print(f"{head}: done before", flush=True)
            return None
        if not same:
            _remove(step.folder, out)
        begun[step.title] = identity
        record.write_text(json.dumps(begun, indent=1))
        print(f"\n{head}\n  $ {shlex.join(_shown(step.command))}", flush=True)
        return _ShownProcess(step, numbers[step.title], out / "logs", beside)

    def ended(one: Running[Step]) -> str:
        number = numbers[one.job.title]
        done_again.add(one.job.result)
        if not one.succeeded:
            return f"step {number} ({one.job.title}) ended with exit code {one.process.exit_code()}"
        print(f"[{number}/{len(steps)}] done in {one.seconds:.0f} s", flush=True)
        return ""

    if failures := run_side_by_side(steps, slots=jobs, start=start, ended=ended):
        raise UserError(f"{' and '.join(failures)}; fix what it says above and run again.")


class _ShownProcess:
    """A step's process, whose output is shown line by line with the step's number before it whenever it is asked after."""

    def __init__(self, step: Step, number: int, logs: Path, beside: int) -> None:
        """`beside`: how many steps share the CPU threads."""
        logs.mkdir(exist_ok=True)
        self._number, self._log, self._shown = number, logs / f"{number:02}.txt", 0
        self._log.unlink(missing_ok=True)
        forked = step.command[0] == sys.executable and not torch.cuda.is_available()
        start = start_forked if forked else start_fresh
        self._process = start(_on_free_port(step.command), self._log, _environment(beside))

    def exit_code(self) -> int | None:
        code = self._process.exit_code()
        self._show()
        return code

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self) -> None:
        self._process.wait()

    def _show(self) -> None:
        """Print the lines that have come since."""
        if not self._log.exists():
            return
        with self._log.open("rb") as file:
            file.seek(self._shown)
            lines = file.read()
        end = max(lines.rfind(b"\n"), lines.rfind(b"\r")) + 1
        self._shown += end
        for line in lines[:end].decode("utf-8", "replace").splitlines():
            if line.strip():
                print(f"  {self._number} | {line}", flush=True)


def _identity(step: Step) -> list[str]:
    """The command, and the contents of the recipes that it names."""
    recipes = [ROOT / word for word in step.command if word.startswith("ds_configs/")]
    return [*step.command, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in recipes)]


def _shown(command: list[str]) -> list[str]:
    return ["python", *command[1:]] if command[0] == sys.executable else command


def _on_free_port(command: list[str]) -> list[str]:
    """With a port for the ranks that no other run on this machine holds (DeepSpeed's launcher always takes 29500)."""
    if command[0] != "deepspeed":
        return command
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return [command[0], "--master_port", str(probe.getsockname()[1]), *command[1:]]


def _environment(beside: int) -> dict[str, str]:
    """This environment, with the interpreter's own folder first, so that `deepspeed` is the one beside it, and a share of the
    CPU threads."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    without_gpu = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}  # else DeepSpeed's launcher looks for one
    threads = {} if beside == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // beside))}
    return {**without_gpu, **threads, **os.environ, "PATH": path}


def _remove(folder: Path, out: Path) -> None:
    """Remove a stale result; never anything outside the quickstart's own folder."""
    assert out.resolve() in folder.resolve().parents
    if folder.is_dir():
        shutil.rmtree(folder)


def parser() -> Parser:
    """The command line."""
    parser = Parser(prog="quickstart", description=__doc__)
    parser.add_argument("--out", default=DEFAULT_OUT, help="folder of everything that is made (default: %(default)s)")
    parser.add_argument("--scenes", type=numeric(int, AT_LEAST_1), default=1200, help="synthetic scenes (default: %(default)s)")
    parser.add_argument(
        "--jobs",
        type=numeric(int, AT_LEAST_1),
        default=1 if torch.cuda.is_available() else 2,
        help="steps side by side (default: %(default)s)",
    )
    return parser


def main() -> None:
    arguments = parser().parse_args()
    out = Path(arguments.out)
    uri = f"sqlite:///{out}/mlflow.db" if importlib.util.find_spec("mlflow") else ""
    os.chdir(ROOT)
    with reported("quickstart"):
        out.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        run_road(road(out, arguments.scenes, uri), out, arguments.jobs)
        print(f"\nThe whole road: {(time.monotonic() - started) / 60:.1f} minutes. Depth on scenes never trained on:\n")
        if not uri:
            for label, name in MODELS.items():
                print(f"{label}:\n{format_summary(json.loads((out / 'evaluate' / name / 'summary.json').read_text()))}")
            print("\nMLflow is not installed: nothing was tracked, and there is no report.")
            return
        print(format_table(results_table(load_runs(uri, experiment=EXPERIMENT))))
        print(f"\nReport with pictures: {out}/report/index.html")
        print(f"MLflow runs:          {uri}; look at them with: .venv/bin/mlflow ui --backend-store-uri {uri}")


if __name__ == "__main__":
    main()
