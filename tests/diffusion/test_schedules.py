import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt.config.sections import DiffusionConfig
from dpt.diffusion import schedules
from dpt.errors import UserError

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [10, 1000])
def test_alphas_cumprod_equal_diffusers(name, total):
    config = DiffusionConfig(beta_schedule=name, num_train_timesteps=total, beta_start=0.00085, beta_end=0.012)
    reference = DDIMScheduler(num_train_timesteps=total, beta_schedule=name, beta_start=0.00085, beta_end=0.012)
    np.testing.assert_allclose(schedules.betas(config), reference.betas, atol=1e-6)
    np.testing.assert_allclose(schedules.alphas_cumprod(config), reference.alphas_cumprod, atol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_diffusers(spacing):
    ddim = DDIMScheduler(timestep_spacing=spacing)
    dpm = DPMSolverMultistepScheduler(timestep_spacing=spacing)
    for steps in (1, 2, 3, 5, 7, 10, 20, 30, 50, 100, 200, 999, 1000):
        ddim.set_timesteps(steps)
        expected = ddim.timesteps.tolist()[:steps]  # diffusers' trailing rounding can add a step at -1
        assert schedules.inference_timesteps(steps, 1000, spacing=spacing).tolist() == expected
        if steps < 1000:
            dpm.set_timesteps(steps)
            ours = schedules.inference_timesteps(steps, 1000, spacing=spacing, extra_point=True)
            assert ours.tolist() == dpm.timesteps.tolist()[:steps]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1000), st.sampled_from(SPACINGS), st.floats(0.2, 5.0))
def test_timesteps_decrease_and_stay_in_range_for_any_power(steps, spacing, power):
    timesteps = schedules.inference_timesteps(steps, 1000, spacing=spacing, power=power)
    assert len(timesteps) == steps
    assert (np.diff(timesteps) < 0).all()
    assert timesteps[-1] >= 0
    assert timesteps[0] <= 999


def test_power_moves_steps():
    plain, late, early = (schedules.inference_timesteps(20, 1000, spacing="trailing", power=p) for p in (1.0, 2.0, 0.5))
    assert late[0] == plain[0] == early[0] == 999
    assert np.median(late) < np.median(plain) < np.median(early)


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="steps 1001"):
        schedules.inference_timesteps(1001, 1000, spacing="trailing")
    with pytest.raises(UserError, match="spacing"):
        schedules.inference_timesteps(10, 1000, spacing="karras")


def test_rectified_flow_is_a_straight_path():
    alpha, sigma = schedules.signal_and_noise(DiffusionConfig(prediction_type="rectified_flow"))
    np.testing.assert_allclose(alpha + sigma, 1.0)
    assert sigma[-1] == 1.0
    assert sigma[0] == pytest.approx(1e-3)


def test_the_network_is_told_the_time_as_it_learnt_it():
    timesteps = torch.tensor([0, 499, 999])
    told = {
        name: schedules.network_time(DiffusionConfig(time_convention=name), timesteps).tolist()
        for name in ("index", "fraction", "scaled_fraction")
    }
    assert told["index"] == [0, 499, 999]
    assert told["fraction"] == pytest.approx([0.001, 0.5, 1.0], rel=1e-6)
    assert told["scaled_fraction"] == [1.0, 500.0, 1000.0]


@pytest.mark.parametrize("trained", SCHEDULES)
@pytest.mark.parametrize("tested", SCHEDULES)
def test_a_schedule_at_test_time_brings_its_own_betas(trained, tested):
    usual = {"linear": (1e-4, 2e-2), "scaled_linear": (0.00085, 0.012)}
    config = DiffusionConfig(beta_schedule=trained, beta_start=0.002, beta_end=0.03, steps_offset=1).with_schedule(tested)
    start, end = (0.002, 0.03) if tested == trained else usual.get(tested, (1e-4, 2e-2))
    expected = DDIMScheduler(beta_schedule=tested, beta_start=start, beta_end=end).alphas_cumprod.double()
    assert (torch.from_numpy(schedules.alphas_cumprod(config)) - expected).abs().max() < 1e-6
    assert config.steps_offset == 1
    with pytest.raises(UserError, match="no noise schedule"):
        DiffusionConfig(prediction_type="rectified_flow").with_schedule(tested)
