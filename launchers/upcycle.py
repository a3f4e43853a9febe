"""Turn a dense DiT into a Mixture-of-Experts and train on."""

from collections.abc import Mapping
from typing import Any

from dpt.config.command import parse_command
from dpt.config.recipe import DptConfig
from dpt.errors import reported
from dpt.training.run import run_stage


def open_validator(config: DptConfig, codes: Mapping[str, str], depth_prompt: str) -> Any:
    """What scores networks while training (`dpt.validation`)."""
    from dpt.evaluation.validation import Validator  # torch must not be loaded before the environment is set

    return Validator(config, codes=codes, depth_prompt=depth_prompt)


if __name__ == "__main__":
    with reported("upcycle"):
        run_stage(parse_command("upcycle", __doc__ or "", "training"), "upcycle", open_validator=open_validator)
