"""What fuzzed commands work on: tiny weights, shards, pictures, a store of runs, and things that are none of these."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dpt.config.sections import TrackingConfig
from dpt.data.codec import load_vae
from dpt.data.manifest import VAERecord
from dpt.tracking import start_run
from dpt.tracking.sender import sync
from tests.shards import moments, write_set
from tests.test_cli import export_tiny

SIDE = 64
"""Of pictures, in pixels; latents have an eighth of it."""


def make_assets(folder: Path) -> None:
    """Write them all into `folder`."""
    vae = load_vae().record
    for task in ("class", "depth", "flow", "amodal"):
        export_tiny(folder, task, f"{task}_weights", num_conditions=2 * (task != "class"))
        _shards(folder / f"{task}_shards", task, vae, evaluation=False)
        if task != "class":
            _shards(folder / f"{task}_set", task, vae, evaluation=True)
    export_tiny(folder, "class", "experts_weights", num_experts=2, top_k=1)
    _shards(folder / "more_class_shards", "class", vae, evaluation=False)
    random = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for name in ("one", "two"):
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / "pictures" / f"{name}.png")
    Image.fromarray(np.tri(SIDE, dtype=np.uint8) * 255).save(folder / "mask.png")
    (folder / "class_pictures" / "cat").mkdir(parents=True)
    Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / "class_pictures" / "cat" / "a.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "broken.json").write_text('{"dpt": {"training": {"steps": 1,}}')
    (folder / "text.txt").write_text("nothing of use\n")
    (folder / "empty").mkdir()
    _store(folder)
    (folder / "study.yaml").write_text(STUDY)


STUDY = """
title: Two lengths
output: study
experiment: e
axes:
  length:
    stages: [pretrain]
    values:
      short: {training.steps: 1}
      long: {training.steps: 2}
stages:
  pretrain:
    launcher: pretrain
    recipe: recipe.json
    axes: [length]
figures:
  - {name: f, x: macs, y: train/loss}
"""


def _shards(folder: Path, task: str, vae: VAERecord, *, evaluation: bool) -> None:
    random, side = np.random.default_rng(0), SIDE // 8

    def make(number: int) -> dict[str, np.ndarray]:
        if task == "class":
            return {"label": np.array(number, np.int64), "latents": moments(random, side)}
        members = {"valid": np.ones((side, side), np.uint8), "cond_latents": moments(random, side, 2)}
        members["target_latents"] = moments(random, side, 2 if task == "flow" else 1)
        if evaluation:
            members["image"] = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            members["truth"] = {
                "depth": random.uniform(1, 5, (SIDE, SIDE)).astype(np.float32),
                "flow": random.normal(size=(2, SIDE, SIDE)).astype(np.float32),
                "amodal": np.tri(SIDE, dtype=np.uint8),
            }[task]
        return members

    fields = {"dataset": "synthetic", "split": "val", "task": task, "resolution": SIDE, "encoding": {"fit": "stretch"}}
    fields["class_names"] = ("a", "b", "c", "d") if task == "class" else ()
    write_set(folder, [4], make, key="s{}", meta={"width": SIDE, "height": SIDE}, vae=vae, **fields)


def recipe(task: str = "class") -> dict[str, object]:
    """Of a tiny run of two steps."""
    perception = task != "class"
    model = {"hidden_size": 32, "depth": 1, "num_heads": 2, "input_size": SIDE // 8, "num_classes": 4}
    training = {"output_dir": "run", "steps": 2, "seed": 0, "lr_schedule": "cosine", "lr_final": 1e-5, "warmup_steps": 1}
    training |= {"ema_decays": [0.9], "log_every": 1, "weights": f"{task}_weights" if perception else ""}
    evaluation = {"weights": "depth_weights", "data": ["depth_set"], "steps": [1], "ensemble": [1], "batch_size": 4}
    return {
        "train_batch_size": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "dpt": {
            "task": task,
            "model": model | {"num_conditions": 2 * perception},
            "diffusion": {"prediction_type": "v_prediction", "beta_schedule": "linear", "vlb_weight": 0.5},
            "data": {"shards": [f"{task}_shards"], "posterior": "mean", "num_workers": 0},
            "training": training,
            "sampling": {"num_inference_steps": 1, "labels": [0], "guidance_scale": 1.5},
            "evaluation": evaluation | {"pictures": 1, "output_dir": "evaluated"},
            "upcycling": {"num_experts": 2, "top_k": 1, "noise_std": 0.0},
            "tracking": {"enabled": False},
        },
    }


def _store(folder: Path) -> None:
    """Runs of three sizes with their evaluations, and the recipe that they are of."""
    (folder / "recipe.json").write_text(json.dumps(recipe()))
    config = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="e", offline=True)
    for width, loss in ((32, 1.0), (64, 0.7), (96, 0.6)):
        content = recipe("depth")
        content["dpt"]["model"]["hidden_size"] = width  # type: ignore[index]
        where = folder / "runs" / str(width)
        options = {"name": f"w{width}", "parents": [], "tags": {"dpt.label": str(width)}}
        with start_run(config, stage="pretrain", params=content, output_dir=where, **options) as run:
            for step in (1, 2, 4):
                run.log_metrics({"train/loss": loss / step, "compute/train_macs": 1e6 * width * step}, step)
        tags = {"dpt.dataset": "synthetic_val", "dpt.protocol": "synthetic_depth v1"}
        options = {"name": f"e{width}", "parents": [run.run_id], "tags": tags}
        with start_run(config, stage="evaluate", params=content, output_dir=where / "evaluated", **options) as evaluated:
            evaluated.log_metrics({"eval/depth/abs_rel": loss / 5, "compute/forward_macs": 1e6 * width}, 0)
    assert not any(problem for _, problem in sync(folder / "runs"))
