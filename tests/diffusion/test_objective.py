import math

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from torch.distributions import Normal, kl_divergence

from dpt.config.sections import DiffusionConfig
from dpt.diffusion.objective import DiffusionObjective
from dpt.diffusion.schedules import betas
from dpt.errors import UserError


def case(config: DiffusionConfig, *, channels: int = 8, timesteps=(0, 1, 400, 999)):
    """An objective and what its loss takes, at random: prediction, latents, noise, noisy latents and timesteps."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(len(timesteps), 4, 3, 5, generator=generator) for _ in range(2))
    prediction = torch.randn(len(timesteps), channels, 3, 5, generator=generator)
    objective, times = DiffusionObjective(config), torch.tensor(timesteps)
    return objective, (prediction, latents, noise, objective.add_noise(latents, noise, times), times)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_noising_and_targets_equal_diffusers(kind, schedule):
    scheduler = DDIMScheduler(beta_schedule=schedule, beta_start=1e-4, beta_end=0.02)
    objective, (_, latents, noise, noisy, timesteps) = case(DiffusionConfig(prediction_type=kind, beta_schedule=schedule))
    assert torch.allclose(noisy, scheduler.add_noise(latents, noise, timesteps), atol=1e-5)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    target = {"epsilon": noise, "sample": latents, "v_prediction": velocity}[kind]
    assert torch.allclose(objective.target(latents, noise, timesteps), target, atol=1e-5)


def test_rectified_flow_goes_straight_from_latents_to_noise():
    config = DiffusionConfig(prediction_type="rectified_flow")
    objective, (_, latents, noise, noisy, timesteps) = case(config, timesteps=(999, 499, 0, 249))
    assert torch.allclose(noisy[0], noise[0])
    assert torch.allclose(noisy[1], (latents[1] + noise[1]) / 2, atol=1e-6)
    assert torch.equal(objective.target(latents, noise, timesteps), noise - latents)
    losses = objective.loss(torch.cat((noise - latents,) * 2, dim=1), latents, noise, noisy, timesteps)
    assert losses["loss"] == 0.0
    assert "vlb" not in losses


def _reference_vlb(prediction, latents, noisy, timesteps) -> torch.Tensor:
    """Per-sample bits per dimension, one sample at a time, from the definitions of q and p (not from closed-form tables)."""
    beta = torch.from_numpy(betas(DiffusionConfig()))
    alpha_bar = torch.cumprod(1 - beta, 0)
    result = []
    for eps, share, x0, xt, t in zip(
        prediction[:, :4].double(),
        prediction[:, 4:].double() / 2 + 0.5,
        latents.double(),
        noisy.double(),
        timesteps.tolist(),
        strict=True,
    ):
        before = alpha_bar[t - 1] if t > 0 else torch.tensor(1.0)

        def posterior_mean(clean, t=t, before=before, xt=xt):
            return (before.sqrt() * beta[t] * clean + (1 - beta[t]).sqrt() * (1 - before) * xt) / (1 - alpha_bar[t])

        first = max(t, 1)
        variance = (1 - alpha_bar[first - 1]) / (1 - alpha_bar[first]) * beta[first]
        std = torch.exp(0.5 * (share * beta[t].log() + (1 - share) * variance.log()))
        x0_hat = (xt - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        if t > 0:
            term = kl_divergence(Normal(posterior_mean(x0), variance.sqrt()), Normal(posterior_mean(x0_hat), std))
        else:

            def cdf(z):
                return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

            z = x0 - posterior_mean(x0_hat)
            upper, lower = cdf((z + 1 / 255) / std), cdf((z - 1 / 255) / std)
            p = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
            term = -p.clamp(min=1e-12).log()
        result.append(term.mean() / math.log(2))
    return torch.stack(result)


@pytest.mark.parametrize("timestep", [0, 1, 2, 50, 400, 999])
def test_learned_variance_bound_equals_the_definition(timestep):
    objective, (prediction, latents, noise, _, timesteps) = case(DiffusionConfig(), timesteps=(timestep,) * 2)
    latents = latents / 2
    prediction = torch.cat((noise + 0.1 * prediction[:, :4], prediction[:, 4:].tanh()), dim=1)
    noisy = objective.add_noise(latents, noise, timesteps)
    losses = objective.loss(prediction, latents, noise, noisy, timesteps)
    expected = _reference_vlb(prediction, latents, noisy, timesteps).mean()
    assert losses["vlb"].item() == pytest.approx(expected.item(), rel=2e-4)
    assert losses["mse"].item() == pytest.approx((prediction[:, :4] - noise).square().mean().item())
    assert losses["loss"].item() == pytest.approx(losses["mse"].item() + losses["vlb"].item())


def test_the_bound_trains_the_variance_only():
    objective, batch = case(DiffusionConfig())
    (gradient,) = torch.autograd.grad(objective.loss(batch[0].requires_grad_(), *batch[1:])["vlb"], batch[0])
    assert (gradient[:, :4] == 0).all()
    assert (gradient[:, 4:] != 0).any()


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_the_bound_is_the_same_whatever_is_predicted(kind):
    bounds = []
    for name in ("epsilon", kind):
        objective, (prediction, *rest) = case(DiffusionConfig(prediction_type=name), timesteps=(1, 5, 300, 900))
        prediction[:, :4] = objective.target(rest[0], rest[1], rest[3])
        bounds.append(objective.loss(prediction, *rest)["vlb"])
    assert bounds[0].item() == pytest.approx(bounds[1].item(), rel=1e-3)


def test_ignored_variance_still_gets_gradients():
    objective, (prediction, *rest) = case(DiffusionConfig(vlb_weight=0.0))
    losses = objective.loss(prediction.requires_grad_(), *rest)
    assert "vlb" not in losses
    losses["loss"].backward()
    assert (prediction.grad[:, 4:] == 0).all()
    assert (prediction.grad[:, :4] != 0).any()


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weights(kind):
    config = DiffusionConfig(prediction_type=kind, min_snr_gamma=5.0)
    objective, (prediction, latents, noise, noisy, timesteps) = case(config, channels=4)
    snr = compute_snr(DDIMScheduler(beta_start=1e-4, beta_end=0.02), timesteps)
    weight = snr.clamp(max=5.0) / {"epsilon": snr, "sample": torch.ones(()), "v_prediction": snr + 1}[kind]
    error = (prediction - objective.target(latents, noise, timesteps)).square().mean((1, 2, 3))
    expected = (weight * error).mean().item()
    assert objective.loss(prediction, latents, noise, noisy, timesteps)["mse"].item() == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UserError, match="min_snr_gamma"):
        DiffusionObjective(DiffusionConfig(prediction_type="rectified_flow", min_snr_gamma=5.0))


def test_the_absolute_error_is_masked_and_averaged_as_the_squared_one_is():
    objective, batch = case(DiffusionConfig(loss="l1", vlb_weight=0.0))
    prediction, _, noise, *_ = batch
    valid = torch.ones(4, 3, 5)
    valid[0, 1:] = 0
    errors = (prediction[:, :4] - noise).abs()
    expected = (errors[0, :, :1].mean() + errors[1:].mean((1, 2, 3)).sum()) / 4
    losses = objective.loss(*batch, valid)
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    squared = DiffusionObjective(DiffusionConfig(vlb_weight=0.0)).loss(*batch, valid)
    assert losses["mse"].item() == squared["loss"].item()


def test_valid_mask_and_splits_of_the_batch():
    objective, batch = case(DiffusionConfig())
    prediction, _, noise, *_ = batch
    valid = torch.ones(4, 3, 5)
    valid[0, 1:], valid[3] = 0, 0
    losses = objective.loss(*batch, valid)
    per_sample = [(prediction[i, :4] - noise[i]).square().mean() for i in (1, 2)] + [
        (prediction[0, :4, :1] - noise[0, :, :1]).square().mean()
    ]
    assert losses["mse"].item() == pytest.approx(sum(per_sample).item() / 4, rel=1e-5)
    halves = [objective.loss(*(x[s] for x in (*batch, valid)))["loss"] for s in (slice(0, 2), slice(2, 4))]
    assert (sum(halves) / 2).item() == pytest.approx(losses["loss"].item(), rel=1e-5)


def test_annealed_noise_strength():
    timesteps = torch.tensor([0, 500])
    assert DiffusionObjective(DiffusionConfig()).noise_strength(timesteps) == 0.0
    annealed = DiffusionObjective(DiffusionConfig(multires_noise_strength=0.9)).noise_strength(timesteps)
    assert annealed.tolist() == pytest.approx([0.0, 0.45])
    fixed = DiffusionConfig(multires_noise_strength=0.9, multires_noise_annealed=False)
    assert DiffusionObjective(fixed).noise_strength(timesteps) == 0.9
