"""Real runs, one stage after the other: pre-training, fine-tuning for each task, upcycling."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import Runs, ToyRun, zero
from training_toys import ROOT, VAE, make_shards

from dpt.evaluation import loading
from dpt.evaluation.prediction import Predictor
from dpt.models.pretrained import read_weights
from dpt.training.export import load_weights
from tests.evaluation.tiny import PoolingCodec
from tests.gloo import run_script


@pytest.fixture(scope="module")
def runs(toy_runs: Runs) -> Runs:
    """Pre-training, fine-tuning for each task, upcycling, and what the upcycled network must equal at its first step."""
    shards = {task: str(make_shards(toy_runs.folder / task, task)) for task in ("depth", "flow", "amodal")}
    short = {"data.posterior": "mean", "training.steps": 3, "model.class_dropout_prob": 0.0}
    depth = {**short, "task": "depth", "model.num_conditions": 1, "data.shards": [shards["depth"]]}
    flow = {**short, "task": "flow", "model.num_conditions": 2, "model.num_classes": 10, "data.shards": [shards["flow"]]}
    all_tasks = {**flow, "task": "generalist", "model.num_classes": 12, "model.patch_embed_tasks": 4}
    all_tasks |= {"data.shards": list(shards.values())}
    start = {"training.weights": str(toy_runs("pretrain"))}
    tuned = {**depth, "training.weights": str(toy_runs("finetune_depth") / "weights")}
    stages = {
        "finetune_depth": {**depth, **start},
        "finetune_flow": {**flow, **start, **zero(2)},
        "finetune_generalist": {**all_tasks, **start, **zero(3)},
        "finetune_again": tuned,
        "upcycle": {**tuned, "upcycling.num_experts": 4, "training.ep_size": 2},
        "untrained": {**depth, "training.steps": 0},
    }
    toy_runs.train(
        2,
        ToyRun(name="pretrain", fields=zero(1)),
        *(ToyRun(name=name, fields=fields, stage=name.split("_")[0]) for name, fields in stages.items()),
    )
    return toy_runs


@pytest.mark.parametrize("task", ["depth", "flow", "generalist"])
def test_fine_tuning_starts_from_pretrained_weights(runs: Runs, task: str) -> None:
    weights = read_weights(runs(f"finetune_{task}") / "weights")
    assert weights.sections["task"] == task
    assert weights.config.num_conditions == (1 if task == "depth" else 2)
    before = read_weights(runs("pretrain") / "weights").state
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"):  # random at first, so others would be far from these
        assert (weights.state[name] - before[name]).abs().max() < 0.05 < before[name].abs().max()


def test_an_upcycled_network_begins_as_the_dense_one(runs: Runs) -> None:
    dense, upcycled = runs.records("finetune_again"), runs.records("upcycle")
    assert upcycled[0]["train/loss"] == pytest.approx(dense[0]["train/loss"], rel=1e-5)
    assert upcycled[0]["train/load_balancing_loss"] >= 2 * 0.99  # of two layers, at least 1 each
    weights = read_weights(runs("upcycle") / "weights")
    assert (weights.config.num_experts, weights.config.expert_activation) == (4, "gelu")


def test_no_steps_export_the_start(runs: Runs) -> None:
    folder = runs("untrained") / "weights"
    averaged, plain = read_weights(folder), read_weights(folder, ema=False)
    assert all(torch.equal(tensor, plain.state[name]) for name, tensor in averaged.state.items())
    assert json.loads((folder / "config.json").read_text())["lineage"]["train_macs"] == 0


def test_a_checkpoint_predicts_as_its_export(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = PoolingCodec()
    codec.record = VAE
    monkeypatch.setattr(loading, "load_vae", lambda name: codec)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    run = runs("finetune_depth")
    checkpoint = runs.checkpoint("finetune_depth")
    export, *others = (Predictor(p, device="cpu", read=load_weights) for p in (run / "weights", run, checkpoint))
    for other in others:
        assert (other.task, other.lineage["step"], other.depth_prompt) == ("depth", 3, export.depth_prompt)
        state = other.network.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in export.network.state_dict().items())
        np.testing.assert_allclose(other([image], steps=1)[0].value, export([image], steps=1)[0].value, atol=1e-5)


def test_the_evaluation_launcher_reads_checkpoints(runs: Runs, tmp_path: Path) -> None:
    """As far as the VAE, which is of no latents here: by then all weights have been read."""
    weights, log = runs("finetune_depth") / "checkpoints", tmp_path / "log"
    launcher = str(ROOT / "launchers" / "evaluate.py")
    assert run_script(log, launcher, "--evaluation.weights", str(weights), "--tracking.enabled", "false") == 2
    assert "trained on latents of another VAE than 'embedded'" in log.read_text().splitlines()[-1]
