"""The whole pipeline on one small machine: scenes -> latents -> pre-train -> fine-tune -> upcycle -> evaluate -> report.

Every step is a command that a user could type. It is shown and run; the next call skips it if its result is still there and
the command has not changed.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import torch

from dpt.commands.steps import Step, run_steps
from dpt.config.numbers import COUNT
from dpt.config.parser import Parser
from dpt.errors import reported
from dpt.evaluation.summary import format_summary
from dpt.scaling.results import format_table, results_table
from dpt.tracking.read import load_runs

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = "quickstart"
DEFAULT_OUT = "runs/quickstart"
STEPS, ENSEMBLE = 10, 5
SPLITS = "train=0.95,val=0.05"
MORE = 1.5
"""Further scenes for the best recipe, per scene of the others' data."""
BEST, FINE = "best", "embedded16"
"""The best model, and the VAE of its latents."""
MODELS = {  # label of the table's row -> folder of exported weights
    "untrained": "untrained",
    "fine-tuned after pre-training": "depth",
    "upcycled to experts": "upcycled",
    "trained to predict in one step": BEST,
}


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def launch(launcher: str, recipe: str, *fields: str) -> list[str]:
    """A launcher, one recipe, and the fields that differ; one process on the CPU skips DeepSpeed's own start-up."""
    start = ["deepspeed", "--quiet"] if torch.cuda.is_available() else python()
    return [*start, f"launchers/{launcher}.py", "--ds_config", f"ds_configs/{recipe}.json", *fields]


def pipeline(out: Path, scenes: int, uri: str) -> list[Step]:
    """The steps, in order. `uri`: the MLflow store; empty: no tracking, and so no report."""
    steps: list[Step] = []
    tracking = ["--tracking.uri", uri, "--tracking.experiment", EXPERIMENT] if uri else ["--tracking.enabled", "false"]

    def add(title: str, command: list[str], result: Path, *needs: Path, folder: Path | None = None) -> None:
        steps.append(Step(title=title, command=command, result=result, folder=folder or result.parent, needs=needs))

    def manifest(name: str) -> Path:
        return out / "shards" / name / "manifest.json"

    def exported(name: str) -> Path:
        return out / name / "weights" / "config.json"

    def scored(name: str) -> Path:
        return out / "evaluate" / name / "summary.json"

    def weights(name: str) -> list[str]:
        return ["--weights", f"{out}/{name}/weights"]

    def elsewhere(field: str, *names: str) -> list[str]:
        """Fields for the shards, where they are not the recipes' own."""
        return [] if out == Path(DEFAULT_OUT) else [field, ",".join(f"{out}/shards/{name}" for name in names)]

    def train(name: str, title: str, launcher: str, recipe: str, *options: str, after: str = "") -> None:
        data = {"pretrain": ["class_train"], BEST: ["depth_train_16", "depth_more_16"]}.get(name, ["depth_train"])
        fields = [*options, *(weights(after) if after else [])]
        fields += ["--output_dir", f"{out}/{name}", "--tracking.run_name", name, *tracking, *elsewhere("--data.shards", *data)]
        needs = [*map(manifest, data), *([exported(after)] if after else [])]
        add(title, launch(launcher, recipe, *fields), exported(name), *needs, folder=out / name)

    for title, name, count, options in (
        ("synthesise textured, lit 3-D scenes with exact ground truth", "scenes", scenes, ["--splits", SPLITS]),
        ("synthesise more of them, for depth", "more_scenes", round(scenes * MORE),
         ["--splits", "train=1", "--tasks", "depth", "--seed", "1"]),
    ):  # fmt: skip
        synthesis = ["--out", f"{out}/{name}", "--scenes", str(count), *options]
        add(title, python("-m", "data_tools.synthesis", *synthesis), out / name / "synthesis.json")
    depth, classes = ["--dataset", "hypersim", "--prompt", "none", "--root"], ["--dataset", "imagenet", "--root"]
    train_split, val_split = ["--split", "train"], ["--split", "val", "--evaluation"]
    for name, folder, vae, arguments in (
        ("depth_more_16", "more_scenes", FINE, [*depth, f"{out}/more_scenes/hypersim", *train_split]),
        ("depth_train_16", "scenes", FINE, [*depth, f"{out}/scenes/hypersim", *train_split]),
        ("class_train", "scenes", "embedded", [*classes, f"{out}/scenes/imagenet", *train_split]),
        ("depth_train", "scenes", "embedded", [*depth, f"{out}/scenes/hypersim", *train_split]),
        ("depth_val_16", "scenes", FINE, [*depth, f"{out}/scenes/hypersim", *val_split]),
        ("depth_val", "scenes", "embedded", [*depth, f"{out}/scenes/hypersim", *val_split]),
    ):
        title = f"encode {name.replace('_', ', ').replace(', 16', ', into 16 channels')} with the VAE"
        arguments += ["--vae", vae, "--resolution", "128", "--out", f"{out}/shards/{name}"]
        add(title, python("-m", "data_tools.encode", *arguments), manifest(name), out / folder / "synthesis.json")
    train(BEST, "train for depth at the last timestep alone", "finetune", "quickstart_best")
    train("pretrain", "pre-train a class-conditional DiT", "pretrain", "quickstart")
    train("depth", "fine-tune for depth after pre-training", "finetune", "quickstart_depth", after="pretrain")
    train("upcycled", "upcycle to experts and train on", "upcycle", "quickstart_upcycle", after="depth")
    train("untrained", "set up an untrained depth model", "finetune", "quickstart_depth", "--steps", "0")
    for label, name in MODELS.items():
        members = "1" if name == "untrained" else f"1,{ENSEMBLE}"
        recipe, fields, data = "quickstart_depth", ["--steps", str(STEPS), "--ensemble", members], "depth_val"
        if name == BEST:
            recipe, fields, data = "quickstart_best", [], "depth_val_16"
        fields += ["--output_dir", f"{out}/evaluate/{name}", *elsewhere("--evaluation.data", data)]
        naming = ["--tracking.run_name", f"evaluate {name}", "--tracking.tags", json.dumps({"dpt.label": label})]
        command = launch("evaluate", recipe, *weights(name), *fields, *tracking, *naming)
        add(f"evaluate: {label}", command, scored(name), exported(name), manifest(data))
    if uri:
        store, page = out / "mlflow.db", out / "report" / "index.html"
        sync = python("-m", "dpt.cli", "sync", str(out))
        add("wait until every record has reached MLflow", sync, store, *map(scored, MODELS.values()), folder=out / "sync")
        report = python("-m", "dpt.cli", "report", EXPERIMENT, "--uri", uri, "--out", str(page))
        add("write the report", report, page, store)
    return steps


def parser() -> Parser:
    """The command line."""
    parser = Parser(prog="quickstart", description=__doc__)
    add, beside = parser.add_argument, 1 if torch.cuda.is_available() else 2
    add("--out", default=DEFAULT_OUT, help="folder for everything that is made")
    add("--scenes", type=COUNT, default=1200, help="synthetic scenes; the best recipe trains on 1.5 times as many more")
    add("--jobs", type=COUNT, default=beside, help="steps run at a time")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    out = Path(arguments.out)
    uri = f"sqlite:///{out}/mlflow.db" if importlib.util.find_spec("mlflow") else ""
    os.chdir(ROOT)
    with reported("quickstart"):
        out.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        run_steps(pipeline(out, arguments.scenes, uri), out, arguments.jobs)
        print(f"\nFinished in {(time.monotonic() - started) / 60:.1f} minutes. Depth on held-out scenes:\n")
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
