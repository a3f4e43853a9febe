"""Losses of decoded predictions: gradients through the frozen decoder, and whole one-step runs, from training to prediction."""

from typing import Any

import numpy as np
import pytest
import torch
from training_runs import Runs, ToyRun, zero
from training_toys import make_shards, records

from dpt import tasks
from dpt.config.checks import check_recipe
from dpt.config.recipe import DptConfig, load_recipe
from dpt.config.sections import DiffusionConfig, EvaluationConfig, ModelConfig, PixelLossConfig, Task, TrainingConfig
from dpt.data.codec import VAECodec, load_vae
from dpt.data.manifest import VAERecord
from dpt.errors import UserError
from dpt.evaluation.prediction import Predictor
from dpt.models.decoder_costs import recipe_macs
from dpt.training.pixel_loss import PixelLoss
from dpt.training.preflight import needs

LATENTS = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
TRUTH = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def codec() -> VAECodec:
    return load_vae("embedded")


def _config(task: Task, *, checkpointing: bool = False, **pixel: Any) -> DptConfig:
    classes = 8 + tasks.num_task_labels(task)
    return DptConfig(
        task=task,
        model=ModelConfig(hidden_size=32, depth=1, num_heads=2, input_size=4, num_classes=classes),
        diffusion=DiffusionConfig(timesteps="last", prediction_type="sample", vlb_weight=0.0),
        training=TrainingConfig(activation_checkpointing=checkpointing),
        pixel_loss=PixelLossConfig(**{"weight": 1.0} | pixel),
    )


def _labels(config: DptConfig, *targets: str) -> torch.Tensor:
    return torch.tensor([tasks.label_id(t, trained_task=config.task, num_classes=config.model.num_classes) for t in targets])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_latents_and_not_the_decoder(codec: VAECodec, checkpointing: bool) -> None:
    config = _config("depth", checkpointing=checkpointing, gradient_weight=0.0, depth="affine_l2")
    latents = LATENTS.clone().requires_grad_(True)
    loss = PixelLoss(config, codec)(latents, TRUTH, _labels(config, *["depth"] * 3), None)
    loss.backward()
    assert not any(p.requires_grad or p.grad is not None for p in codec.vae.parameters())
    step = 0.03 * latents.grad / latents.grad.abs().max()
    nearer = PixelLoss(config, codec)(LATENTS - step, TRUTH, _labels(config, *["depth"] * 3), None)
    assert (loss.item() - nearer.item()) == pytest.approx((step * latents.grad).sum().item(), rel=0.05)


def test_depth_is_scored_after_the_fit_that_evaluation_makes(codec: VAECodec) -> None:
    """Against numpy's least squares on the decoded maps, sample by sample."""
    config = _config("depth", gradient_weight=0.0)
    valid = torch.ones(3, 4, 4, dtype=torch.uint8)
    valid[0, :2] = 0
    loss = PixelLoss(config, codec)(LATENTS, TRUTH, _labels(config, *["depth"] * 3), valid)
    with torch.no_grad():
        found, true = codec.decode_with_gradients(LATENTS).mean(1).numpy(), codec.decode(TRUTH).mean(1).numpy()
    errors = []
    for p, t, v in zip(found, true, valid.numpy(), strict=True):
        known = np.kron(v, np.ones((8, 8))).astype(bool)
        matrix = np.stack([p[known], np.ones(known.sum())], axis=1)
        fit, *_ = np.linalg.lstsq(matrix, t[known], rcond=None)
        errors.append(np.abs(matrix @ fit - t[known]).mean())
    assert loss.item() == pytest.approx(np.mean(errors), rel=0.02)  # the fit of a scale is damped a little


def test_a_generalist_scores_each_sample_as_its_own_task(codec: VAECodec) -> None:
    generalist = _config("generalist")
    mixed = PixelLoss(generalist, codec)(LATENTS, TRUTH, _labels(generalist, "whole", "flow_y", "depth"), None)
    alone = []
    for sample, (task, target) in enumerate([("amodal", "whole"), ("flow", "flow_y"), ("depth", "depth")]):
        config, one = _config(task), slice(sample, sample + 1)  # type: ignore[arg-type]
        alone.append(PixelLoss(config, codec)(LATENTS[one], TRUTH[one], _labels(config, target), None))
    torch.testing.assert_close(mixed, torch.stack(alone).mean())


def test_flow_is_scored_in_pixels(codec: VAECodec) -> None:
    config = _config("flow")
    loss = PixelLoss(config, codec)(LATENTS[:1], TRUTH[:1], _labels(config, "flow_x"), None)
    with torch.no_grad():
        u, true = (
            tasks.decode_flow(image, 0, 32) for image in (codec.decode_with_gradients(LATENTS[:1]), codec.decode(TRUTH[:1]))
        )
    assert loss.item() == pytest.approx((u - true).abs().mean().item(), rel=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, codec: VAECodec) -> Runs:
    """The same one-step run on one rank, on two, and stopped and resumed."""
    runs = Runs(tmp_path_factory.mktemp("one_step"))
    vae = VAERecord(name="embedded", sha256=codec.sha256, scaling_factor=codec.scaling_factor, latent_channels=4)
    fields = {
        "task": "depth",
        "model.num_conditions": 1,
        "model.class_dropout_prob": 0.0,
        "diffusion.timesteps": "last",
        "diffusion.initial_noise": "zero",
        "diffusion.prediction_type": "v_prediction",
        "diffusion.vlb_weight": 0.0,
        "pixel_loss.weight": 0.5,
        "data.shards": [str(make_shards(runs.folder / "depth", "depth", count=24, vae=vae))],
        "data.posterior": "mean",
        "training.steps": 4,
        **zero(1),
    }
    runs.train(1, [ToyRun(name="one", fields=fields, stage="finetune")])
    split = fields | {"train_micro_batch_size_per_gpu": 2}
    runs.train(
        2,
        [
            ToyRun(name="two", fields=split, stage="finetune"),
            ToyRun(name="resumed", fields=fields, stage="finetune", sigterm_at=2, ends="stopped"),
            ToyRun(name="resumed", fields=fields, stage="finetune"),
        ],
    )
    return runs


def test_splits_and_stops_change_nothing(runs: Runs) -> None:
    one = records(runs("one"))
    assert all(np.isfinite(record["train/pixel_loss"]) for record in one)
    for record in one:
        both = record["train/mse"] + 0.5 * record["train/pixel_loss"]
        assert record["train/loss"] == pytest.approx(both, rel=1e-5)
    for name in ("two", "resumed"):
        for record, other in zip(one, records(runs(name)), strict=True):
            for metric in ("train/loss", "train/pixel_loss", "train/grad_norm"):
                assert other[metric] == pytest.approx(record[metric], rel=2e-4), (name, metric)


def test_decoding_counts_as_compute_and_as_memory(runs: Runs) -> None:
    recipe = load_recipe(runs.recipe, {"task": "depth", "model.num_conditions": 1, "pixel_loss.weight": 0.5})
    plain = load_recipe(runs.recipe, {"task": "depth", "model.num_conditions": 1})
    per_sample = recipe_macs(recipe.dpt, recipe.dpt.model).training
    assert per_sample > recipe_macs(plain.dpt, plain.dpt.model).training
    assert records(runs("one"))[-1]["compute/train_macs"] == per_sample * 4 * 8
    assert "decoder" in needs(recipe, "finetune", 1).plan
    assert needs(recipe, "finetune", 1).bytes_per_rank > needs(plain, "finetune", 1).bytes_per_rank


def test_its_weights_predict_in_one_pass_whatever_is_asked_for(runs: Runs) -> None:
    images = [np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)]
    asked = EvaluationConfig(steps=[50], ensemble=[10], seed=1)
    predictor = Predictor(runs("one") / "weights", config=asked, device="cpu")
    assert (predictor.config.steps, predictor.config.ensemble) == ([1], [1])
    passes: list[int] = []
    predictor.network.register_forward_hook(lambda *_: passes.append(1))
    first = predictor(images, steps=50, ensemble=10)[0].value
    assert len(passes) == 1
    again = Predictor(runs("one") / "weights", config=EvaluationConfig(seed=2), device="cpu")(images)[0].value
    np.testing.assert_array_equal(first, again)


def test_what_cannot_be_is_refused(runs: Runs) -> None:
    one_step = {"diffusion.timesteps": "last", "diffusion.prediction_type": "sample", "diffusion.vlb_weight": 0.0}
    many_steps = {"task": "depth", "model.num_conditions": 1, "pixel_loss.weight": 1.0}
    for fields, words in ((one_step, "is for perception"), (many_steps, 'it needs "last"')):
        with pytest.raises(UserError, match=words):
            check_recipe(load_recipe(runs.recipe, fields), 1, "finetune")
