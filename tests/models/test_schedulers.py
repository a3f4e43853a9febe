"""diffusers' scheduler folders: taken over, so that our samplers walk as diffusers' own do, or refused by name."""

import itertools
import json

import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from dpt.config.sections import DiffusionConfig
from dpt.diffusion import samplers
from dpt.errors import UserError
from dpt.models.schedulers import describe, read_scheduler
from tests.diffusion.walks import assert_close, network, start, walk

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
BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SAID = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "rescale_betas_zero_snr")

predict = network()


def assert_equal_walks(folder, scheduler, steps, sampler="ddim"):
    """Our walk by the folder that the scheduler saves, and the scheduler's own, in double precision."""
    scheduler.save_pretrained(folder)
    plan = samplers.make_plan(read_scheduler(folder), num_inference_steps=steps, sampler=sampler)
    said = DiffusionConfig(**{name: scheduler.config[name] for name in SAID if name in scheduler.config})
    assert_close(samplers.sample(predict, start(), plan), walk(scheduler, said, steps, predict))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_walks_as_the_folder_says(tmp_path, schedule, spacing, prediction):
    for offset, to_one, zero in itertools.product((0, 1), (True, False), (True, False)):
        if zero and prediction == "epsilon" and spacing != "leading":
            continue  # diffusers divides by 0 there; ours refuses it, as tested below
        scheduler = DDIMScheduler(
            beta_schedule=schedule, **BETAS, timestep_spacing=spacing, steps_offset=offset,
            set_alpha_to_one=to_one, prediction_type=prediction, rescale_betas_zero_snr=zero, clip_sample=False,
        )  # fmt: skip
        for steps in (1, 7):
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
    assert_close(samplers.sample(predict, start(), samplers.make_plan(config, num_inference_steps=50)), x)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpm_solver_walks_as_the_folder_says(tmp_path, spacing):
    for offset in (0, 1):
        scheduler = DPMSolverMultistepScheduler(
            beta_schedule="scaled_linear", **BETAS, timestep_spacing=spacing, steps_offset=offset
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
