import dataclasses
import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

from dpt.config.sections import DiffusionConfig
from dpt.diffusion import noise, samplers, schedules
from dpt.errors import UserError
from tests.diffusion.walks import SHAPE, assert_close, network, start, walk

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SAMPLERS = ("ddim", "ddpm", "dpmsolver++")
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
def test_deterministic_samplers_equal_diffusers(sampler, schedule, spacing, prediction):
    config = DiffusionConfig(beta_schedule=schedule, prediction_type=prediction)
    said = {"beta_schedule": schedule, "prediction_type": prediction, "timestep_spacing": spacing, **BETAS}
    if sampler == "ddim":
        scheduler, numbers = DDIMScheduler(clip_sample=False, **said), (1, 2, 7, 50)
    else:
        scheduler, numbers = DPMSolverMultistepScheduler(**said), (1, 2, 3, 10, 25)
    for steps in numbers:
        plan = samplers.make_plan(config, num_inference_steps=steps, timestep_spacing=spacing, sampler=sampler)
        assert_close(samplers.sample(network(), start(), plan), walk(scheduler, config, steps, network()))


def _fresh_noise(seeds: torch.Tensor, steps: int) -> list[torch.Tensor]:
    return [noise.normal(noise.derive(seeds, i), SHAPE[1:]) for i in range(steps)]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_stochastic_ddim_equals_diffusers(eta, prediction):
    seeds = noise.key_seeds(0, ["a", "b"], [0, 0])
    config = DiffusionConfig(prediction_type=prediction)
    scheduler = DDIMScheduler(prediction_type=prediction, timestep_spacing="trailing", clip_sample=False, **BETAS)
    scheduler.set_timesteps(10)
    plan = samplers.make_plan(config, num_inference_steps=10, eta=eta)
    x = start().double()
    for i, t in enumerate(scheduler.timesteps):
        fresh = _fresh_noise(seeds, 10)[i].double()
        x = scheduler.step(network()(x, t.expand(2)), t, x, eta=eta, variance_noise=fresh, return_dict=False)[0]
    assert_close(samplers.sample(network(), start(), plan, seeds=seeds), x)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_ddpm_equals_diffusers(variance, spacing, prediction, monkeypatch):
    if variance == "learned_range" and spacing == "trailing":
        pytest.skip("diffusers adds noise of a learned variance on the last step when it does not start from t = 0")
    seeds = noise.key_seeds(0, ["a", "b"], [0, 0])
    config = DiffusionConfig(prediction_type=prediction)
    scheduler = DDPMScheduler(
        prediction_type=prediction, timestep_spacing=spacing, clip_sample=False, variance_type=variance, **BETAS
    )
    predict = network(8 if variance == "learned_range" else 4)
    plan = samplers.make_plan(config, num_inference_steps=20, sampler="ddpm", timestep_spacing=spacing)
    fresh = iter(_fresh_noise(seeds, 20))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(fresh).double())
    reference = walk(scheduler, config, 20, predict)
    assert_close(samplers.sample(predict, start(), plan, seeds=seeds), reference)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", [*PREDICTIONS, "rectified_flow"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
def test_a_perfect_network_reaches_the_clean_latents(sampler, prediction, schedule):
    config = DiffusionConfig(beta_schedule=schedule, prediction_type=prediction)
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    alpha, sigma = (torch.from_numpy(a).float() for a in schedules.signal_and_noise(config))

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, s = (table[t][:, None, None, None] for table in (alpha, sigma))
        eps = (x - a * clean) / s
        return {"epsilon": eps, "sample": clean, "v_prediction": a * eps - s * clean, "rectified_flow": eps - clean}[prediction]

    for steps, spacing, power in ((1, "trailing", 1.0), (8, "trailing", 1.0), (8, "linspace", 2.0), (20, "leading", 0.6)):
        plan = samplers.make_plan(
            config, num_inference_steps=steps, sampler=sampler, timestep_spacing=spacing, step_power=power
        )
        result = samplers.sample(predict, start(), plan)
        tolerance = 5e-3 if prediction == "epsilon" and schedule == "squaredcos_cap_v2" else 1e-4  # 1 / alpha is up to 2e4
        assert torch.allclose(result, clean, atol=tolerance)


def test_euler_on_straight_paths():
    config = DiffusionConfig(prediction_type="rectified_flow")
    plan = samplers.make_plan(config, num_inference_steps=5)
    x = start()
    for t, following in zip((999, 799, 599, 399, 199), (799, 599, 399, 199, -1), strict=True):
        x = x + (following - t) / 1000 * network()(x, torch.full((2,), t))
    assert torch.allclose(samplers.sample(network(), start(), plan), x, atol=1e-5)
    for bad in ({"sampler": "ddpm"}, {"eta": 0.5}):
        with pytest.raises(UserError, match="rectified flow"):
            samplers.make_plan(config, num_inference_steps=5, **bad)
    with pytest.raises(UserError, match="euler"):
        samplers.make_plan(config, num_inference_steps=5, sampler="euler")


@pytest.mark.parametrize("sampler", ["ddpm", "dpmsolver++"])
def test_other_samplers_have_no_eta(sampler):
    with pytest.raises(UserError, match=r"dpt\.evaluation\.eta is 0\.5, which is DDIM's alone"):
        samplers.make_plan(DiffusionConfig(), num_inference_steps=4, sampler=sampler, eta=0.5)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_stochastic_samples_do_not_depend_on_the_batch(sampler, eta):
    seeds = noise.key_seeds(0, ["a", "b"], [0, 0])
    plan = samplers.make_plan(DiffusionConfig(), num_inference_steps=6, sampler=sampler, eta=eta)
    whole = samplers.sample(network(), start(), plan, seeds=seeds)
    parts = [samplers.sample(network(), start()[i : i + 1], plan, seeds=seeds[i : i + 1]) for i in (0, 1)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)


def test_unknown_objectives_are_refused():
    plan = samplers.make_plan(DiffusionConfig(), num_inference_steps=2)
    with pytest.raises(UserError, match="cannot be sampled"):
        samplers.sample(network(), start(), dataclasses.replace(plan, diffusion=DiffusionConfig(prediction_type="score")))


def test_guidance_on_all_or_the_first_channels():
    weight = torch.tensor([1.0, -0.5])

    def predict(x, t):
        conditional = torch.arange(len(x)) < len(x) // 2
        return torch.cat((x, x), dim=1) * torch.where(conditional, weight[0], weight[1])[:, None, None, None]

    x, t = start(), torch.zeros(2, dtype=torch.int64)
    everything = samplers.guide(predict, scale=3.0, channels=4)(x, t)
    assert torch.allclose(everything[:, :4], (-0.5 + 3.0 * 1.5) * x)
    assert torch.allclose(everything[:, 4:], x)
    first = samplers.guide(predict, scale=3.0, channels=4, guided_channels=3)(x, t)
    assert torch.allclose(first[:, :3], 4.0 * x[:, :3])
    assert torch.allclose(first[:, 3:], torch.cat((x, x), 1)[:, 3:])


def test_guidance_acts_within_its_interval_alone_and_costs_two_passes_there_only():
    """w(t) = w inside, 1 outside (Kynkaanniemi et al. 2024, eq. 4 and 5): against a loop that mixes by that weight itself."""
    config, low, high, scale = DiffusionConfig(prediction_type="sample"), 0.2, 0.6, 3.0
    passes = []

    def predict(x, t):
        passes.append((len(x), int(t[0])))
        half = len(x) // 2 if len(x) > 2 else len(x)
        wanted = torch.arange(len(x)) < half
        return torch.sin(x) * torch.where(wanted, 1.0, -0.5)[:, None, None, None]

    plan = samplers.make_plan(config, num_inference_steps=10, guidance_interval=(low, high))
    guided = samplers.guide(predict, scale=scale, channels=4)
    found = samplers.sample(guided, start(), plan, unguided=predict)
    for count, timestep in passes:
        assert count == (4 if low <= timestep / 1000 <= high else 2)
    assert {count for count, _ in passes} == {2, 4}

    def mixed(x, t):
        weight = scale if low <= int(t[0]) / 1000 <= high else 1.0
        conditional, unconditional = torch.sin(x), -0.5 * torch.sin(x)
        return unconditional + weight * (conditional - unconditional)

    expected = samplers.sample(mixed, start(), samplers.make_plan(config, num_inference_steps=10))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("steps", [5, 7, 50])
def test_flow_that_learnt_fractions_is_told_fractions(steps):
    """DiT-MoE's sampler: z <- z - v(z, i / n) / n for i = n ... 1, at steps that do not divide T too."""
    config = DiffusionConfig(prediction_type="rectified_flow", time_convention="fraction")

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) + torch.sin(5 * t)[:, None, None, None]

    z = start().double()
    for i in range(steps, 0, -1):
        z = z - predict(z, torch.full((2,), i / steps, dtype=torch.float64)) / steps
    plan = samplers.make_plan(config, num_inference_steps=steps)
    assert (samplers.sample(predict, start(), plan) - z).abs().max() < 2e-6


def test_zero_terminal_snr():
    """Lin et al. 2024: the last alpha is 0, the first as before, the others between in proportion."""
    plain, zero = (DiffusionConfig(prediction_type="v_prediction", rescale_betas_zero_snr=z) for z in (False, True))
    before, after = schedules.signal_and_noise(plain)[0], schedules.signal_and_noise(zero)[0]
    assert after[-1] == 0.0
    expected = (before - before[-1]) * before[0] / (before[0] - before[-1])
    assert abs(after - expected).max() < 1e-12
    for sampler, prediction, steps in itertools.product(SAMPLERS, ("v_prediction", "sample"), (1, 2, 10)):
        config = dataclasses.replace(zero, prediction_type=prediction)
        plan = samplers.make_plan(config, num_inference_steps=steps, sampler=sampler)
        assert torch.isfinite(samplers.sample(network(), start(), plan, seeds=torch.tensor([1, 2]))).all()
    epsilon = dataclasses.replace(zero, prediction_type="epsilon")
    samplers.make_plan(epsilon, num_inference_steps=4, timestep_spacing="leading")  # never at pure noise
    with pytest.raises(UserError, match="pure noise"):
        samplers.make_plan(epsilon, num_inference_steps=4)


def test_an_offset_must_not_lead_beyond_the_last_timestep():
    with pytest.raises(UserError, match="beyond the last timestep"):
        samplers.make_plan(DiffusionConfig(steps_offset=1, timestep_spacing="leading"), num_inference_steps=1000)
