"""Allowed ranges of numbers: one check for recipe fields and command-line options."""

import argparse
import math
from dataclasses import dataclass
from typing import Any

from dpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Range:
    """Finite numbers from `least` to `most`, excluding the bounds `above` and `below`. "inf" is included if it is `most`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not math.isfinite(value):
            return value == math.inf == self.most
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        parts = [
            f"{word} {bound:g}"
            for word, bound in (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
            if bound is not None and math.isfinite(bound)
        ]
        return " and ".join(parts) or "finite"

    def check(self, name: str, value: Any) -> None:
        """Raise UserError, naming the field, unless `value` is in the range."""
        if value not in self:
            raise UserError(f"{name} is {value!r}; it must be {self}.")


FINITE = Range()
NOT_NEGATIVE = Range(least=0)
AT_LEAST_1 = Range(least=1)
POSITIVE = Range(above=0)
SHARE = Range(least=0, most=1)
SAMPLER_STEPS = Range(least=1, most=1000)
ENSEMBLE_SIZES = Range(least=1, most=50)


@dataclass(frozen=True)
class Number:
    """The `type` of an argparse option: text to a number in a range, which `Parser` shows in the option's help."""

    kind: type[int] | type[float]
    allowed: Range

    def __call__(self, text: str) -> int | float:
        try:
            value = self.kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if value not in self.allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is no {self}")
        return value

    def __str__(self) -> str:
        word = "whole number" if self.kind is int else "number"
        return word if self.allowed == FINITE else f"{word} {self.allowed}"


def numeric(kind: type[Any], allowed: Range = FINITE) -> Number:
    """The `type` of an argparse option: text to a number in a range."""
    return Number(kind, allowed)


WHOLE = Number(int, FINITE)
NATURAL = Number(int, NOT_NEGATIVE)
COUNT = Number(int, AT_LEAST_1)
