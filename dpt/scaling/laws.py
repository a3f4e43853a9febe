"""Power laws y = a x^b and y = a x^b + c: fits in log space, confidence, a test of extrapolation, and honest refusals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpt.errors import UserError

LEAST_SPAN = 2.0
"""The greatest x must be this many times the least for an exponent to mean anything."""
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Law:
    """y = a x^b + c."""

    a: float
    b: float
    c: float = 0.0

    def __call__(self, x: Any) -> Any:
        return self.a * np.asarray(x, dtype=np.float64) ** self.b + self.c

    def equation(self, y: str = "L", x: str = "C") -> str:
        """The equation as the paper's figures write it, e.g. "L(C) = 0.23 × C^-0.0098"."""
        offset = f" + {_digits(self.c)}" if self.c else ""
        return f"{y}({x}) = {_digits(self.a)} × {x}^{self.b:.4g}{offset}"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law and how certain it is."""

    law: Law
    x: np.ndarray
    y: np.ndarray
    r2: float
    """Share of the variance of log y that the law explains."""
    interval_a: tuple[float, float]
    interval_b: tuple[float, float]
    interval_c: tuple[float, float]
    """95% bootstrap intervals."""
    holdout_error: float | None
    """Mean relative error on the quarter of the points with the greatest x, by a fit without them; None: too few points."""
    samples: np.ndarray
    """Bootstrap fits `[n, 3]`: a, b, c."""

    def predict(self, x: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The law at x, and the ends of its 95% interval."""
        x = np.asarray(x, dtype=np.float64)
        a, b, c = (self.samples[:, i, None] for i in range(3))
        values = a * np.atleast_1d(x) ** b + c
        low, high = np.quantile(values, _tails(), axis=0)
        return self.law(x), low.reshape(x.shape), high.reshape(x.shape)

    def sentence(self, y: str = "L", x: str = "C") -> str:
        """Equation, confidence and quality on one line."""
        low, high = self.interval_b
        parts = [self.law.equation(y, x), f"exponent 95% [{low:.4g}, {high:.4g}]", f"R² {self.r2:.3f}", f"{len(self.x)} points"]
        if self.holdout_error is not None:
            parts.append(f"held-out error {self.holdout_error:.1%}")
        return "; ".join(parts)


def fit_power_law(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    *,
    offset: bool = False,
    runs: Sequence[str] = (),
    on_frontier: bool = False,
    samples: int = 1000,
    seed: int = 0,
) -> Fit:
    """Fit y = a x^b (with `offset`: + c, 0 <= c < min y) by least squares of log y; `on_frontier`: of the `frontier` alone.

    `runs` names the run of each point; empty: every point is a run. Points of a run are correlated, and which points a frontier
    holds is chance too: where a run has several points, or a frontier is chosen, confidence comes from `samples` fits to whole
    runs drawn with replacement, with a new frontier each time. Otherwise, and where all points are of one run, it comes from a
    residual bootstrap (Efron 1979). Both are scaled by sqrt(n / (n - p)) and by Student's t over the normal quantile, as few
    runs or points require. With an offset there are a fifth as many fits. Raises UserError, in a sentence, if the points cannot
    support the fit.
    """
    all_x, all_y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    _check_positive(all_x, all_y)
    groups = _by_run(all_x, all_y, runs)
    kept = frontier(all_x, all_y) if on_frontier else np.arange(len(all_x))
    x, y = all_x[kept], all_y[kept]
    _check(x, offset)
    law = _fit(x, y, offset)
    residuals = np.log(y) - np.log(law(x))
    if len(groups) > 1 and (on_frontier or len(groups) < len(x)):
        draws = _run_bootstrap(groups, x, law, offset, on_frontier, samples, seed)
    else:
        draws = _bootstrap(x, law, residuals, offset, samples, seed)
    (a0, b0, c0), (a1, b1, c1) = np.quantile(draws, _tails(), axis=0).tolist()
    if b0 <= 0.0 <= b1:
        raise UserError(
            f"the points show no power law: the 95% interval of the exponent, [{b0:.3g}, {b1:.3g}], holds 0; "
            "add points over a wider range, or more seeds."
        )
    spread = float(np.sum((np.log(y) - np.log(y).mean()) ** 2))
    return Fit(
        law=law,
        x=x,
        y=y,
        r2=1.0 - float(np.sum(residuals**2)) / spread if spread > 0 else 1.0,
        interval_a=(a0, a1),
        interval_b=(b0, b1),
        interval_c=(c0, c1),
        holdout_error=_holdout_error(x, y, offset),
        samples=draws,
    )


def _check(x: np.ndarray, offset: bool) -> None:
    needed = 4 if offset else 3
    if len(np.unique(x)) < needed:
        kind = "y = a x^b + c" if offset else "y = a x^b"
        raise UserError(f"{len(np.unique(x))} different x cannot carry a fit of {kind}; at least {needed} are needed.")
    if x.max() < LEAST_SPAN * x.min():
        raise UserError(
            f"x spans only a factor of {x.max() / x.min():.2g}, from {x.min():.3g} to {x.max():.3g}; "
            f"a law needs a factor of {LEAST_SPAN:g} at least."
        )


def _check_positive(x: np.ndarray, y: np.ndarray) -> None:
    if x.shape != y.shape or x.ndim != 1:
        raise UserError(f"a law needs as many x as y, but there are {x.size} and {y.size}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise UserError("a power law needs x and y that are finite and above 0; leave the other points out.")


def _fit(x: np.ndarray, y: np.ndarray, offset: bool, near: Law | None = None) -> Law:
    middle = float(np.log(x).mean())  # centred, so that a and b are found independently
    u, v = np.log(x) - middle, np.log(y)
    slope = float(u @ (v - v.mean()) / (u @ u))
    level = float(v.mean())
    if not offset:
        return Law(a=math.exp(level - slope * middle), b=slope)
    if near is not None:
        starts = [(math.log(near.a) + near.b * middle, near.b, near.c)]
    else:
        starts = [_start(u, v, share * float(y.min())) for share in (1e-3, 0.3, 0.7, 0.95)]
    level, slope, c = _fit_offset(u, v, starts)
    return Law(a=math.exp(level - slope * middle), b=slope, c=c)


def _start(u: np.ndarray, v: np.ndarray, c: float) -> tuple[float, float, float]:
    """Level and slope for a given c: the straight line through log(y - c)."""
    remainder = np.log(np.exp(v) - c)
    return float(remainder.mean()), float(u @ remainder / (u @ u)), c


def _fit_offset(u: np.ndarray, v: np.ndarray, starts: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Least squares of log(exp(level + slope u) + c) - v from several starts, since there are local minima."""
    from scipy.optimize import least_squares
    from scipy.special import expit

    top = float(v.min())  # upper bound of log c

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.logaddexp(p[0] + p[1] * u, p[2]) - v

    def slopes(p: np.ndarray) -> np.ndarray:
        share = expit(p[0] + p[1] * u - p[2])  # the power law's share of the whole
        return np.stack([share, share * u, 1 - share], axis=1)

    bounds = ([-np.inf, -np.inf, top - 20.0], [np.inf, np.inf, top])
    found = []
    for level, slope, c in starts:
        guess = (level, slope, min(max(math.log(max(c, 1e-300)), top - 19.9), top - 1e-3))
        found.append(least_squares(residuals, guess, jac=slopes, bounds=bounds))
    best = min(found, key=lambda f: f.cost).x
    return float(best[0]), float(best[1]), math.exp(best[2])


def _by_run(x: np.ndarray, y: np.ndarray, runs: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The points of each run."""
    names = np.asarray(runs if len(runs) else np.arange(len(x)))
    if len(names) != len(x):
        raise UserError(f"a law needs a run for each of its {len(x)} points, but {len(names)} are named.")
    return [(x[names == name], y[names == name]) for name in dict.fromkeys(names.tolist())]


def _run_bootstrap(
    groups: Sequence[tuple[np.ndarray, np.ndarray]],
    x: np.ndarray,
    law: Law,
    offset: bool,
    on_frontier: bool,
    samples: int,
    seed: int,
) -> np.ndarray:
    """Fits `[n, 3]` to runs drawn with replacement. Draws that define no line (a frontier of one x) are redrawn."""
    rng = np.random.default_rng(seed)
    wanted = max(50, samples // 5) if offset else samples
    middle = float(np.log(x).mean())
    level = math.log(law.a) + law.b * middle
    widening = _widening(len(groups), 1)
    fits: list[tuple[float, float, float]] = []
    for _ in range(10 * wanted):
        drawn = [groups[i] for i in rng.integers(len(groups), size=len(groups))]
        u, v = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        if on_frontier:
            kept = frontier(u, v)
            u, v = u[kept], v[kept]
        if len(np.unique(u)) < (3 if offset else 2):
            continue
        fit = _fit(u, v, offset, near=law if offset else None)
        slope = law.b + widening * (fit.b - law.b)
        there = level + widening * (math.log(fit.a) + fit.b * middle - level)
        fits.append((math.exp(there - slope * middle), slope, fit.c))
        if len(fits) == wanted:
            return np.array(fits)
    raise UserError(f"{len(groups)} runs are too few for an interval: most draws of them carry no law; add runs.")


def _widening(count: int, parameters: int) -> float:
    """Factor that widens deviations among `count` values: sqrt(n / (n - p)) times Student's t over the normal quantile."""
    from scipy.stats import norm, t

    freedom = max(count - parameters, 1)
    tail = 1 - (1 - _CONFIDENCE) / 2
    return math.sqrt(count / freedom) * float(t.ppf(tail, freedom) / norm.ppf(tail))


def _bootstrap(x: np.ndarray, law: Law, residuals: np.ndarray, offset: bool, samples: int, seed: int) -> np.ndarray:
    """Fits `[samples, 3]` to the law's own values with resampled residuals."""
    n, p = len(x), 3 if offset else 2
    inflated = (residuals - residuals.mean()) * _widening(n, p)
    rng = np.random.default_rng(seed)
    log_values = np.log(law(x)) + rng.choice(inflated, size=(samples, n))
    if offset:
        fits = [_fit(x, np.exp(row), True, near=law) for row in log_values[: max(50, samples // 5)]]
        return np.array([(f.a, f.b, f.c) for f in fits])
    u = np.log(x) - np.log(x).mean()
    slopes = log_values @ u / (u @ u)
    levels = log_values.mean(axis=1) - slopes * np.log(x).mean()
    return np.stack([np.exp(levels), slopes, np.zeros(samples)], axis=1)


def _holdout_error(x: np.ndarray, y: np.ndarray, offset: bool) -> float | None:
    """Mean |prediction / y - 1| on the quarter of the points with the greatest x, by a fit without them."""
    order = np.argsort(x, kind="stable")
    kept, held = np.split(order, [len(x) - max(1, len(x) // 4)])
    if len(np.unique(x[kept])) < (4 if offset else 3):
        return None
    law = _fit(x[kept], y[kept], offset)
    return float(np.mean(np.abs(law(x[held]) / y[held] - 1)))


def frontier(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> np.ndarray:
    """Indices, by rising x, of the lower convex hull in log-log: the least y that each x can buy."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    _check_positive(x, y)
    u, v = np.log(x), np.log(y)
    hull: list[int] = []
    best = math.inf
    for i in np.lexsort((v, u)):
        if v[i] >= best:
            continue  # something cheaper is as good
        best = v[i]
        while len(hull) > 1 and _turns_up(u, v, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(int(i))
    return np.array(hull, dtype=np.int64)


def _turns_up(u: np.ndarray, v: np.ndarray, i: int, j: int, k: int) -> bool:
    """Whether point j lies on or above the line from i to k."""
    return bool((v[j] - v[i]) * (u[k] - u[i]) >= (v[k] - v[i]) * (u[j] - u[i]))


def _tails() -> list[float]:
    return [(1 - _CONFIDENCE) / 2, 1 - (1 - _CONFIDENCE) / 2]


def _digits(value: float) -> str:
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"
