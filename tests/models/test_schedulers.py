"""diffusers' scheduler folders: taken over, so that our samplers walk as diffusers' own do, or refused by name."""

import itertools
import json
import warnings

import pytest
import torch

from dpt.diffusion import samplers
from dpt.errors import UserError
from dpt.models.schedulers import describe, read_scheduler

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        PNDMScheduler,
    )
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

STABLE_DIFFUSION_2 = {  # as that folder was written by an early version of diffusers
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def predict(x, t):
    """A fixed smooth function of the noisy latents and the time."""
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(5)).to(x) / 2
    return torch.tanh(torch.einsum("oc,bchw->bohw", weight, x)) + 0.3 * torch.sin(5 * t.to(x)[:, None, None, None] / 1000)


def start():
    return torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))


def betas(config):
    """The file's betas in double precision, by their formulas."""
    n, low, high = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.beta_schedule == "linear":
        result = torch.linspace(low, high, n, dtype=torch.float64)
    elif config.beta_schedule == "scaled_linear":
        result = torch.linspace(low**0.5, high**0.5, n, dtype=torch.float64) ** 2
    else:
        bar = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * torch.pi / 2) ** 2
        result = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    return rescale_zero_terminal_snr(result) if config.rescale_betas_zero_snr else result


def walk(scheduler, steps):
    """diffusers' trajectory in double precision: its own tables are single, which 1 / alpha multiplies by up to 2e4."""
    config = scheduler.config
    scheduler.alphas_cumprod = torch.cumprod(1 - betas(config), dim=0)
    if "set_alpha_to_one" in config:
        scheduler.final_alpha_cumprod = torch.tensor(1.0).double() if config.set_alpha_to_one else scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    x = start().double()
    for t in scheduler.timesteps[:steps]:
        x = scheduler.step(predict(x, t.expand(len(x))), t, x, return_dict=False)[0]
    return x


def assert_equal_walks(folder, scheduler, steps, sampler="ddim"):
    scheduler.save_pretrained(folder)
    plan = samplers.make_plan(read_scheduler(folder), num_inference_steps=steps, sampler=sampler)
    ours, theirs = samplers.sample(predict, start(), plan), walk(scheduler, steps)
    assert (ours.double() - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max())


SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_walks_as_the_folder_says(tmp_path, schedule, spacing, prediction):
    for offset, to_one, zero in itertools.product((0, 1), (True, False), (True, False)):
        if zero and prediction == "epsilon" and spacing != "leading":
            continue  # diffusers divides by 0 there; ours refuses it, as tested below
        scheduler = DDIMScheduler(
            beta_schedule=schedule, beta_start=0.00085, beta_end=0.012, timestep_spacing=spacing, steps_offset=offset,
            set_alpha_to_one=to_one, prediction_type=prediction, rescale_betas_zero_snr=zero, clip_sample=False,
        )  # fmt: skip
        for steps in (1, 7, 50):
            assert_equal_walks(tmp_path, scheduler, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_folder_of_stable_diffusion_2(tmp_path, prediction):
    """What the released perception pipeline loads, as diffusers itself reads and walks it, in single precision."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps(STABLE_DIFFUSION_2 | {"prediction_type": prediction}))
    theirs = DDIMScheduler.from_pretrained(tmp_path)
    theirs.set_timesteps(50)
    x = start()
    for t in theirs.timesteps:
        x = theirs.step(predict(x, t.expand(2)), t, x).prev_sample
    config = read_scheduler(tmp_path / "scheduler_config.json")
    assert (config.steps_offset, config.timestep_spacing, config.set_alpha_to_one) == (1, "leading", False)
    ours = samplers.sample(predict, start(), samplers.make_plan(config, num_inference_steps=50))
    assert (ours - x).abs().max() <= 1e-5 * max(1.0, x.abs().max())


@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpm_solver_walks_as_the_folder_says(tmp_path, spacing):
    for offset in (0, 1):
        scheduler = DPMSolverMultistepScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing=spacing, steps_offset=offset
        )
        assert_equal_walks(tmp_path, scheduler, 20, "dpmsolver++")


def test_flow_matching_walks_between_the_timesteps(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.save_pretrained(tmp_path)
    for steps in (2, 7, 28):
        scheduler.set_timesteps(steps)
        x = start()
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t.expand(2)), t, x).prev_sample
        plan = samplers.make_plan(read_scheduler(tmp_path), num_inference_steps=steps)
        assert (samplers.sample(predict, start(), plan) - x).abs().max() < 1e-5


def test_every_class_is_read_as_its_own_defaults_say(tmp_path):
    expected = {DDPMScheduler: "leading", PNDMScheduler: "leading", EulerDiscreteScheduler: "linspace"}
    for kind, spacing in expected.items():
        given = {"clip_sample": False} if kind is DDPMScheduler else {}
        kind(**given).save_pretrained(tmp_path)
        full = read_scheduler(tmp_path)
        (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": kind.__name__, **given}))
        assert read_scheduler(tmp_path) == full
        assert full.timestep_spacing == spacing
        assert full.set_alpha_to_one == (kind is not PNDMScheduler)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clip_sample": True}, "clip_sample is True"),
        ({"thresholding": True}, "thresholding is True"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is True"),
        ({"wings": 2}, "unknown to dpt: wings"),
        ({"_class_name": "HeunDiscreteScheduler"}, "_class_name is 'HeunDiscreteScheduler'"),
        ({"beta_schedule": "sigmoid"}, "scheduler.beta_schedule is 'sigmoid'"),
        ({"steps_offset": "one"}, "scheduler.steps_offset is 'one'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "shift is 3.0"),
    ],
)
def test_what_dpt_does_not_do_is_refused_by_name(tmp_path, change, words):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(STABLE_DIFFUSION_2 | change))
    with pytest.raises(UserError, match=r"scheduler_config\.json") as error:
        read_scheduler(tmp_path)
    assert words in str(error.value)


def test_clipping_that_diffusers_defaults_to_is_refused_too(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(UserError, match="diffusers' default"):
        read_scheduler(tmp_path)


def test_a_stored_objective_with_an_unknown_field_is_one_sentence():
    with pytest.raises(UserError, match=r"weights: .*diffusion.*noise_offset"):
        describe({"prediction_type": "epsilon", "noise_offset": 0.1}, "weights")
    assert describe({"prediction_type": "v_prediction"}, "weights").startswith("v_prediction, 1000 timesteps")
