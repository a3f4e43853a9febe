"""Entry point of the training launchers: train a recipe from the command line, with evaluation for `dpt.validation`."""

from collections.abc import Mapping
from typing import Any

from dpt.config.command import parse_command
from dpt.config.recipe import DptConfig
from dpt.errors import reported
from dpt.plugins import load_plugins
from dpt.training.run import run_stage


def run_launcher(stage: str, description: str) -> None:
    """Run the command line as `stage` ("pretrain", "finetune" or "upcycle"); `description` heads its help."""
    with reported(stage):
        load_plugins()
        run_stage(parse_command(stage, description, "training"), stage, open_validator=open_validator)


def open_validator(config: DptConfig, codes: Mapping[str, str], depth_prompt: str) -> Any:
    """Open the validator that scores networks for `dpt.validation`."""
    from dpt.evaluation.validation import Validator  # torch must not be loaded before the environment is set

    return Validator(config, codes=codes, depth_prompt=depth_prompt)
