"""How sections check their fields."""

from dpt.errors import UserError


def check(ok: bool, sentence: str) -> None:
    """UserError with the sentence unless `ok`."""
    if not ok:
        raise UserError(sentence)


def check_interval(low: float, high: float, section: str) -> None:
    """UserError unless guidance acts in an interval of [0, 1]."""
    check(
        0.0 <= low <= high <= 1.0,
        f"{section}.guidance_low {low} and guidance_high {high} must obey 0 <= low <= high <= 1.",
    )
