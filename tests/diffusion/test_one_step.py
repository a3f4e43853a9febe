"""One-step networks: trained at the last timestep alone, where nothing of the truth is left, and sampled in one pass."""

from typing import Any, get_args, get_type_hints

import pytest
import torch

from dpt.config.sections import DiffusionConfig, EvaluationConfig
from dpt.diffusion.objective import DiffusionObjective
from dpt.diffusion.samplers import make_plan, sample
from dpt.errors import UserError

SCHEDULES = get_args(get_type_hints(DiffusionConfig)["beta_schedule"])
PREDICTIONS = ("sample", "v_prediction", "rectified_flow")


def one_step(**fields: Any) -> DiffusionConfig:
    return DiffusionConfig(**{"timesteps": "last", "prediction_type": "v_prediction", "vlb_weight": 0.0} | fields)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_input_holds_nothing_of_the_truth_and_a_perfect_prediction_gives_it_back(schedule: str, prediction: str) -> None:
    config = one_step(beta_schedule=schedule, prediction_type=prediction)
    objective = DiffusionObjective(config)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.full((3,), config.num_train_timesteps - 1)
    noisy = objective.add_noise(latents, noise, timesteps)
    assert torch.equal(noisy, noise)
    target = objective.target(latents, noise, timesteps)
    torch.testing.assert_close(objective.clean(target, noisy, timesteps), latents)

    asked: list[int] = []

    def perfect(seen: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        asked.extend(at.tolist())
        assert torch.equal(seen, noise)
        return target

    for spacing in ("leading", "trailing", "linspace"):
        plan = make_plan(config, num_inference_steps=1, timestep_spacing=spacing)
        torch.testing.assert_close(sample(perfect, noise, plan), latents)
    assert asked == [999] * 9


def test_more_steps_than_one_are_refused() -> None:
    with pytest.raises(UserError, match="predict in one step"):
        make_plan(one_step(), num_inference_steps=50)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type"),
        ({"vlb_weight": 1.0}, "vlb_weight is 1.0"),
        ({"min_snr_gamma": 5.0}, "min_snr_gamma"),
        ({"initial_noise": "zero", "multires_noise_strength": 0.9}, "multires_noise_strength"),
        ({"timesteps": "uniform", "initial_noise": "zero"}, "initial_noise"),
        ({"timestep_scale": 0.0}, "timestep_scale"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        one_step(**fields)


def test_evaluation_settles_on_one_pass() -> None:
    asked = EvaluationConfig(steps=[10, 50], ensemble=[1, 5])
    assert asked.settled(DiffusionConfig()) == asked
    random, zero = (asked.settled(one_step(initial_noise=kind)) for kind in ("random", "zero"))
    assert (random.steps, random.ensemble) == ([1], [1, 5])
    assert (zero.steps, zero.ensemble) == ([1], [1])
