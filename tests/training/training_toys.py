"""Tiny shards, recipes and launches for the tests of training."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpt import distributed
from dpt.config.sections import ModelConfig
from dpt.data.manifest import VAERecord
from dpt.models.dit import DiT
from dpt.training.checkpoint import newest_checkpoint
from tests.shards import moments, write_set

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 8
SIDE = 4


VAE = VAERecord(name="embedded", sha256="0" * 64, scaling_factor=1.0, latent_channels=4)
"""Of no VAE that there is, so no class samples are drawn."""


def make_shards(
    folder: Path,
    task: str = "class",
    *,
    count: int = 64,
    shards: int = 2,
    features: int = 0,
    **manifest: Any,
) -> Path:
    """A shard folder of random moments, with so many channels of features; `manifest`: as `write_shards` takes it."""
    random = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        members = _sample(random, task)
        if features:
            maps = random.normal(size=(features, SIDE, SIDE)).astype(np.float16)
            members = {name: members[name] for name in ("label", "valid") if name in members} | {"features": maps} | members
        samples.append(members)
    names = tuple(f"class {number}" for number in range(CLASSES)) if task == "class" else ()
    return write_shards(folder, samples, task, shards=shards, class_names=names, **manifest)


def write_shards(
    folder: Path, samples: Sequence[dict[str, np.ndarray]], task: str, *, shards: int = 1, vae: VAERecord = VAE, **more: Any
) -> Path:
    """A shard folder of these samples' members; `more` fields of its manifest."""
    fields = {"task": task, "resolution": 8 * SIDE, "vae": vae, "dataset": "toy", **more}
    meta = {"width": 8 * SIDE, "height": 8 * SIDE}
    return write_set(folder, [len(samples) // shards] * shards, samples.__getitem__, meta=meta, **fields)


def _sample(random: np.random.Generator, task: str) -> dict[str, np.ndarray]:
    if task == "class":
        return {"label": np.array(random.integers(CLASSES), dtype=np.int64), "latents": moments(random, SIDE)}
    return {
        "valid": (random.random((SIDE, SIDE)) > 0.2).astype(np.uint8),
        "cond_latents": moments(random, SIDE, 2),
        "target_latents": moments(random, SIDE, 2 if task == "flow" else 1),
    }


def make_recipe(path: Path, shards: Sequence[Path], **fields: Any) -> Path:
    """A recipe of a tiny network; `fields` replace those of its "training"."""
    recipe = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01}},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.5,
        "dpt": {
            "task": "class",
            "hardware": "CPU",
            "model": {
                "preset": "S/2",
                "input_size": SIDE,
                "hidden_size": 32,
                "depth": 2,
                "num_heads": 2,
                "num_classes": CLASSES,
            },
            "data": {"shards": [str(folder) for folder in shards]},
            "training": {
                "output_dir": str(path.with_suffix("")),
                "steps": 20,
                "warmup_steps": 3,
                "ema_decays": [0.9, 0.5],
                "log_every": 1,
                "checkpoint_every": 0,
                **fields,
            },
            "sampling": {"num_inference_steps": 2, "labels": [0]},
            "tracking": {"enabled": False},
        },
    }
    path.write_text(json.dumps(recipe))
    return path


def random_network(config: ModelConfig) -> DiT:
    """With no weight left at zero."""
    torch.manual_seed(0)
    network = DiT(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


MOE = {
    "model.num_experts": 4,
    "model.top_k": 2,
    "model.shared_expert_width": 16,
    "training.router_z_loss_weight": 1e-3,
    "training.ema_warmup": True,
    "training.expert_distance_every": 5,
}


def environment() -> dict[str, str]:
    """One thread a process, the interpreter's own launchers first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_accelerators"],
    "torchrun": ["torchrun", "--nproc_per_node"],  # starts faster
}


def launch(launcher: str, ranks: int, *arguments: str, timeout_s: float = 1200) -> subprocess.CompletedProcess[str]:
    """Run a script on `ranks` processes; its output is in `stdout`."""
    command = [*LAUNCHERS[launcher], str(ranks), "--master_port", str(distributed.free_port()), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
    )


def records(run: Path) -> list[dict[str, float]]:
    """The run's records, by step."""
    return [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]


FOUR_RANKS = ("--steps", "4", "--model.num_experts", "4", "--training.ep_size", "2")
"""Of a run that two nodes of two ranks shall do."""


def check_four_ranks(run: Path) -> None:
    """AssertionError unless they have done it."""
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4]
    found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    assert found[1]["layout"]["world_size"] == 4
