"""One check of numbers, in recipes and on command lines."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest

from dpt.config.numbers import AT_LEAST_1, SHARE, Range, numeric
from dpt.config.recipe import load_recipe
from dpt.errors import UserError


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (AT_LEAST_1, (1, 7), (0, -7, math.nan, math.inf, True, "3", None)),
        (SHARE, (0, 0.5, 1), (-0.1, 1.1, math.nan)),
        (Range(above=0, below=180), (1e-9, 179), (0, 180)),
        (Range(above=0, most=math.inf), (1, math.inf), (0, -math.inf, math.nan)),
        (Range(), (-3, 1e300), (math.inf, math.nan)),
    ],
)
def test_ranges(allowed: Range, inside: tuple[Any, ...], outside: tuple[Any, ...]) -> None:
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)


def test_options_name_what_they_may_be() -> None:
    assert numeric(int, AT_LEAST_1)("3") == 3
    for text, words in (("0", "'0' is no whole number at least 1"), ("x", "no whole number"), ("1.5", "no whole number")):
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            numeric(int, AT_LEAST_1)(text)
    for text in ("nan", "inf", "-1e999"):
        with pytest.raises(argparse.ArgumentTypeError):
            numeric(float)(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"optimizer": {"params": {"lr": -1}}}, "optimizer.params.lr is -1; it must be above 0"),
        ({"optimizer": {"params": {"lr": "fast"}}}, "optimizer.params.lr is 'fast'; it must be above 0"),
        ({"optimizer": {"params": {"betas": [0.9]}}}, "optimizer.params.betas is [0.9]; it must be two numbers"),
        ({"optimizer": {"params": {"weight_decay": -0.1}}}, "optimizer.params.weight_decay is -0.1; it must be at least 0"),
        ({"optimizer": "AdamW"}, "optimizer is 'AdamW'; it must be an object"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1; it must be at least 0"),
        ({"bf16": True}, "bf16 is True; it must be an object"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled is 'yes'; it must be true or false"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; it must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer is 'cpu'"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown is 1; it must be true or false"),
        ({"dpt": {"training": {"timeout_s": math.inf}}}, "dpt.training.timeout_s is inf; it must be finite"),
        ({"dpt": {"sampling": {"guidance_scale": math.nan}}}, "dpt.sampling.guidance_scale is nan; it must be finite"),
        ({"dpt": {"evaluation": {"guidance_low": 0.2}}}, "guidance_low 0.2 and guidance_high 1 do nothing while guidance_sc"),
        ({"dpt": {"sampling": {"guidance_scale": 1.0, "guidance_high": 0.5}}}, "guidance_high 0.5 do nothing while guidance_"),
        ({"dpt": {"training": {"ema_decays": [math.nan]}}}, "dpt.training.ema_decays is nan; it must be finite"),
        ({"dpt": {"sampling": {"num_inference_steps": 0}}}, "dpt.sampling.num_inference_steps is 0"),
        ({"dpt": {"training": {"lr_final": -1.0}}}, "dpt.training.lr_final is -1.0"),
    ],
)
def test_numbers_of_recipes_are_checked(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as refusal:
        load_recipe(path)
    assert words in str(refusal.value)
    assert str(path) in str(refusal.value)
