"""What the network sees: latents, flips, labels, drops, conditions and masks, sample by sample."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dpt.config.recipe import DptConfig
from dpt.config.sections import DataConfig, DiffusionConfig, ModelConfig, TrainingConfig
from dpt.data.codec import LatentScaling
from dpt.errors import UserError
from dpt.models.dit import DiT
from dpt.training.step import Inputs, LossModule, Preparation

BATCH, SIDE = 64, 4
MODEL: dict[str, Any] = {"hidden_size": 32, "depth": 1, "num_heads": 2, "input_size": SIDE, "num_classes": 8}


def _prepare(config: DptConfig, batch: dict[str, Tensor], tasks: list[str] | None = None) -> Inputs:
    preparation = Preparation(
        config, tasks=tasks or ["class"], scaling=LatentScaling(scale=0.5), device=torch.device("cpu"), dtype=torch.float32
    )
    return preparation(batch)


def _moments(*leading: int, logvar: float = -60.0) -> Tensor:
    mean = torch.randn(*leading, 1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(len(leading)))
    return torch.cat([mean, torch.full_like(mean, logvar)], dim=-4).half()


def _class_batch() -> dict[str, Tensor]:
    return {
        "latents": _moments(BATCH),
        "latents_mirrored": _moments(BATCH).flip(-1),
        "label": torch.arange(BATCH) % 8,
        "sample_index": torch.arange(BATCH),
    }


def _config(**sections: Any) -> DptConfig:
    return DptConfig(**{"model": ModelConfig(**MODEL), "training": TrainingConfig(seed=3), **sections})


def test_a_batch_is_its_samples() -> None:
    config = _config(data=DataConfig(horizontal_flip=True), diffusion=DiffusionConfig(multires_noise_strength=0.9))
    batch = _class_batch()
    whole = _prepare(config, batch)
    for part in (slice(0, 5), slice(5, BATCH)):
        inputs = _prepare(config, {name: tensor[part] for name, tensor in batch.items()})
        for name, tensor in inputs._asdict().items():
            if tensor is not None:
                torch.testing.assert_close(tensor, getattr(whole, name)[part], rtol=0, atol=1e-6)


def test_a_label_beyond_the_classes_is_named() -> None:
    batch: dict[str, Any] = {**_class_batch(), "key": [f"sample{i}" for i in range(BATCH)]}
    batch["label"] = batch["label"].clone()
    batch["label"][1] = _config().model.num_classes
    with pytest.raises(UserError, match=r"sample sample1 has label \d+, dpt.model.num_classes is \d+; raise it"):
        _prepare(_config(), batch)


def test_class_latents_are_scaled_samples_half_of_them_mirrored() -> None:
    batch = _class_batch()
    inputs = _prepare(_config(data=DataConfig(horizontal_flip=True)), batch)
    mean = 0.5 * batch["latents"][:, 0].float()
    plain = torch.isclose(inputs.latents, mean, atol=1e-5).flatten(1).all(1)
    mirrored = torch.isclose(inputs.latents, mean.flip(-1), atol=1e-5).flatten(1).all(1)
    assert (plain ^ mirrored).all()
    assert 20 < int(mirrored.sum()) < 44
    wide = _prepare(_config(), {**batch, "latents": _moments(BATCH, logvar=0.0)})
    assert (wide.latents - mean).std() == pytest.approx(0.5, rel=0.05)  # scaled too
    still = _prepare(_config(data=DataConfig(posterior="mean")), {**batch, "latents": _moments(BATCH, logvar=0.0)})
    torch.testing.assert_close(still.latents, mean)


def test_labels_are_dropped_to_null_at_the_given_rate() -> None:
    batch = _class_batch()
    batch["sample_index"] = torch.arange(20_000)
    batch = {name: tensor.repeat(313, *[1] * (tensor.ndim - 1))[:20_000] for name, tensor in batch.items()}
    batch["sample_index"] = torch.arange(20_000)
    inputs = _prepare(_config(model=ModelConfig(**MODEL, class_dropout_prob=0.1)), batch)
    dropped = inputs.labels == 8
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(inputs.labels[~dropped], batch["label"][~dropped])
    assert torch.equal(inputs.task_labels, batch["label"])
    assert inputs.timesteps.min() < 10
    assert inputs.timesteps.max() > 990


def test_noisy_latents_follow_the_schedule() -> None:
    inputs = _prepare(_config(), _class_batch())
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    alphas = (1 - betas).cumprod(0)[inputs.timesteps][:, None, None, None].float()
    torch.testing.assert_close(inputs.noisy_latents, alphas.sqrt() * inputs.latents + (1 - alphas).sqrt() * inputs.noise)
    assert torch.equal(inputs.network_input, inputs.noisy_latents)


def test_a_mixture_takes_each_sources_targets_and_labels() -> None:
    config = _config(
        task="generalist",
        model=ModelConfig(**MODEL | {"num_classes": 12}, num_conditions=2, class_dropout_prob=0.0),
        data=DataConfig(posterior="mean"),
    )
    batch = {
        "cond_latents": _moments(BATCH, 2),
        "target_latents": _moments(BATCH, 2),  # as the stream gives them: one-target tasks filled up with zeros
        "valid": torch.ones(BATCH, SIDE, SIDE, dtype=torch.uint8),
        "sample_index": torch.arange(BATCH),
        "source": torch.arange(BATCH) % 3,
    }
    inputs = _prepare(config, batch, ["depth", "flow", "amodal"])
    expected = {0: {8}, 1: {10, 11}, 2: {9}}
    for source, labels in expected.items():
        assert set(inputs.labels[batch["source"] == source].tolist()) == labels
    choice = (inputs.labels == 11).long()
    targets = 0.5 * batch["target_latents"][torch.arange(BATCH), choice, 0].float()
    torch.testing.assert_close(inputs.latents, targets)
    conditions = 0.5 * batch["cond_latents"][:, :, 0].float()
    torch.testing.assert_close(inputs.network_input[:, :8], conditions.flatten(1, 2))
    torch.testing.assert_close(inputs.network_input[:, 8:], inputs.noisy_latents)


def test_a_specialist_with_one_condition_is_asked_with_the_null_label() -> None:
    config = _config(task="depth", model=ModelConfig(**MODEL, num_conditions=1), data=DataConfig(posterior="mean"))
    batch = {
        "cond_latents": _moments(BATCH, 2),
        "target_latents": _moments(BATCH, 1),
        "valid": torch.ones(BATCH, SIDE, SIDE, dtype=torch.uint8),
        "sample_index": torch.arange(BATCH),
        "source": torch.zeros(BATCH, dtype=torch.int64),
    }
    inputs = _prepare(config, batch, ["depth"])
    assert inputs.network_input.shape == (BATCH, 8, SIDE, SIDE)
    assert inputs.labels.eq(8).all()


def test_the_loss_weighs_its_parts_and_heeds_the_mask() -> None:
    experts = {"num_experts": 4, "top_k": 2}
    config = _config(
        model=ModelConfig(**MODEL, **experts),
        training=TrainingConfig(balance_loss_weight=0.5, router_z_loss_weight=0.25),
    )
    inputs = _prepare(config, _class_batch())
    module = LossModule(DiT(config.model), config)
    losses = module(*inputs)
    total = losses.loss + 0.5 * losses.balance + 0.25 * losses.z
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-6)
    assert losses.loss.item() == pytest.approx((losses.mse + losses.vlb).item(), rel=1e-6)
    assert losses.total.requires_grad
    assert not losses.loss.requires_grad
    assert losses.tokens_per_expert.sum() == BATCH * (SIDE // 2) ** 2 * 2

    valid = torch.zeros(BATCH, SIDE, SIDE, dtype=torch.uint8)
    valid[:, :2] = 1
    spoiled = inputs._replace(valid=valid, noise=torch.where(valid[:, None].bool(), inputs.noise, 1e3))
    masked = module(*inputs._replace(valid=valid))
    assert float(module(*spoiled).mse) == pytest.approx(float(masked.mse), rel=1e-5)


@pytest.mark.parametrize(("convention", "told"), [("index", lambda t: t), ("fraction", lambda t: (t + 1) / 1000)])
def test_the_network_is_told_the_time_by_convention(convention: Any, told: Any) -> None:
    config = _config(diffusion=DiffusionConfig(prediction_type="rectified_flow", time_convention=convention))
    inputs = _prepare(config, _class_batch())
    module, seen = LossModule(DiT(config.model), config), []
    module.network.t_embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module(*inputs)
    torch.testing.assert_close(seen[0].float(), told(inputs.timesteps).float())
