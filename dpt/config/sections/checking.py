"""Field checks shared by the sections."""

from typing import Any

from dpt.config.numbers import Range
from dpt.errors import UserError


def check(ok: bool, sentence: str) -> None:
    """Raise UserError with the sentence unless `ok`."""
    if not ok:
        raise UserError(sentence)


def check_fields(config: Any, section: str, allowed: Range, *names: str) -> None:
    """Raise UserError, naming the field, unless each of these fields of a section's `config` is a number in the range."""
    for name in names:
        allowed.check(f"{section}.{name}", getattr(config, name))


def check_interval(config: Any, section: str, name: str) -> None:
    """Raise UserError unless the fields NAME_low and NAME_high bound an interval in [0, 1]."""
    low, high = getattr(config, f"{name}_low"), getattr(config, f"{name}_high")
    check(0.0 <= low <= high <= 1.0, f"{section}.{name}_low {low} and {name}_high {high} must obey 0 <= low <= high <= 1.")


def check_guidance(config: Any, section: str) -> None:
    """Raise UserError unless guidance_low and guidance_high bound an interval, and there is guidance for it to limit."""
    check_interval(config, section, "guidance")
    whole = (config.guidance_low, config.guidance_high) == (0.0, 1.0)
    check(
        whole or config.guidance_scale != 1.0,
        f"{section}.guidance_low {config.guidance_low:g} and guidance_high {config.guidance_high:g} do nothing while "
        f"guidance_scale is 1, without guidance; set guidance_scale, or them to 0 and 1.",
    )
