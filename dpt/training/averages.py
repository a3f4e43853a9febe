"""Power-function averages of the weights, and averages of any other length built from their snapshots after the fact.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), 2024, section 3. After t updates
the average of exponent g weighs the weights of update i by (i^(g+1) - (i-1)^(g+1)) / t^(g+1): its length grows with the run. A
length is given relative to the run, as the standard deviation of that profile (EDM2's sigma_rel).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BINS = 20_000


class Profile(NamedTuple):
    """How an average weighs the course of a run."""

    exponent: float
    updates: int
    """Updates made when the average was taken."""


class Mix(NamedTuple):
    """A mixture of averages closest to another average."""

    shares: list[float]
    """Each average's share; they sum to 1."""
    residual: float
    """Distance of the mixed profile from the wanted one, relative to the latter's norm (L2)."""


def exponent(length: float) -> float:
    """The exponent g of relative length (g + 1)^(1/2) (g + 2)^(-1) (g + 3)^(-1/2) (EDM2, section 3).

    `length`: above 0, below 1 / sqrt(12).
    """
    inverse = length**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6 * abs(root)))


def new_share(exponent: float, update: int) -> float:
    """The share of the new weights in the average at an update (1 is the first): 1 - (1 - 1 / t)^(g + 1)."""
    return 1.0 if update == 1 else -math.expm1((exponent + 1) * math.log1p(-1 / update))


def mix(profiles: Sequence[Profile], wanted: Profile) -> Mix:
    """The shares of averages with such `profiles` whose sum is closest to `wanted`, which is not older than them.

    Least squares over the updates, or bins of them in long runs, among shares that sum to 1.
    """
    edges = np.linspace(0.0, wanted.updates, min(wanted.updates, _BINS) + 1)
    columns = np.stack([_weights(profile, edges) for profile in profiles], axis=1)
    target, last = _weights(wanted, edges), columns[:, -1]
    shares, *_ = np.linalg.lstsq(columns[:, :-1] - last[:, None], target - last, rcond=1e-7)
    shares = np.append(shares, 1.0 - shares.sum())
    residual = np.linalg.norm(columns @ shares - target) / np.linalg.norm(target)
    return Mix([float(share) for share in shares], float(residual))


def _weights(profile: Profile, edges: np.ndarray) -> np.ndarray:
    """A profile's exact weight on the updates between edges."""
    return np.diff(np.clip(edges / profile.updates, 0.0, 1.0) ** (profile.exponent + 1))


def first_spacing(steps: int, most: int) -> int:
    """Steps between snapshots in a run of `steps`, at most `most` of them: a power of two, so that longer runs share them."""
    return 1 << (max(1, -(-steps // most)) - 1).bit_length()


def spacing(step: int, every: int, most: int) -> int:
    """Steps between the snapshots that are kept at `step`: `every`, doubled until at most `most` of them fit.

    A function of the step alone, so that a continued run keeps what it would have kept.
    """
    while step // every > most:
        every *= 2
    return every
