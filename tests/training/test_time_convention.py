"""Training goes on with the time convention that its first weights learnt with."""

import dataclasses

import pytest

from dpt.config.recipe import DptConfig, Recipe
from dpt.config.sections import DiffusionConfig, TrainingConfig
from dpt.errors import UserError
from dpt.models.exporting import export_weights
from dpt.training.stages import open_stage
from tests.models.networks import random_model


def test_weights_of_another_time_convention_are_refused(tmp_path):
    model = random_model()
    learnt = DiffusionConfig(prediction_type="rectified_flow", time_convention="fraction")
    path = export_weights(model, tmp_path / "weights", sections={"diffusion": dataclasses.asdict(learnt)})

    def stage(diffusion):
        config = DptConfig(model=model.config, diffusion=diffusion, training=TrainingConfig(weights=str(path)))
        return open_stage(Recipe(deepspeed={}, dpt=config, path="recipe.json"), "finetune")

    assert stage(learnt).start is not None
    with pytest.raises(UserError, match=r'time_convention is "index".*learnt with "fraction"; set it'):
        stage(dataclasses.replace(learnt, time_convention="index"))
