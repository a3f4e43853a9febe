import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt.config.sections import DiffusionConfig
from dpt.diffusion import schedules
from dpt.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

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
