"""How an error depends on all that compute can buy at once: model size, pre-training, fine-tuning, upcycling, and test time.

error = (c + sum_i A_i x_i^-alpha_i) * upcycling * sampler * ensemble: a power law for each training quantity, added up with
what none of them removes (the parametric form of Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models",
equation 2), times the measured effects of the method of fine-tuning with its sampler steps, and of the ensemble size. Added
rather than multiplied, since then a budget has a best split inside its range. A constant stands for the term of pre-training
where there was none.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpt.config.recipe import Recipe
from dpt.errors import UserError
from dpt.scaling.observations import FACTORS, Kind, Observation, Setting, kind

_PRIOR = 0.02  # how much a parameter's prior weighs against a residual of log error
_LEAST_RUNS = 4


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A fitted dependence, with bootstrap fits for confidence."""

    factors: list[str]
    """Factors that the observations vary; the others are ignored."""
    ranges: dict[str, tuple[float, float]]
    """Least and greatest observed value of every factor; for pre-training, zero left out."""
    settings: dict[Setting, Recipe]
    """Observed settings, each with the parts of its method's recipe that affect cost (`added_macs`)."""
    pretraining: Recipe | None
    """The same parts of the newest model's pre-training recipe; None: no model was pre-trained."""
    seen: set[Kind]
    """Observed kinds of models."""
    usual_method: str
    """The method of most runs."""
    upcycling: bool
    """Whether both upcycled and dense models were observed."""
    scratch: bool
    """Whether both pre-trained models and models trained from scratch were observed."""
    centre: np.ndarray
    parameters: np.ndarray
    samples: np.ndarray
    """Bootstrap fits `[n, p]`."""
    residual: float
    """Root mean square of the residuals of log error."""

    def expected(self, quantities: dict[str, float], *, upcycled: bool, setting: Setting) -> float:
        """The expected error."""
        return float(self._errors(self.parameters[None], quantities, upcycled, setting)[0])

    def interval(self, quantities: dict[str, float], *, upcycled: bool, setting: Setting) -> tuple[float, float]:
        """The 95% interval of the expected error."""
        errors = self._errors(self.samples, quantities, upcycled, setting)
        low, high = np.quantile(errors, [0.025, 0.975])
        return float(low), float(high)

    def _errors(self, fits: np.ndarray, quantities: dict[str, float], upcycled: bool, setting: Setting) -> np.ndarray:
        x = _logs([quantities], self.factors) - self.centre
        effects = _effects([(upcycled, setting)], self.settings)
        return np.exp([_log_error(p, x, effects)[0] for p in fits])

    def exponents(self) -> dict[str, tuple[float, float, float]]:
        """alpha of each factor, with its 95% interval."""
        table = {}
        for number, name in enumerate(self.factors):
            column = 2 + 2 * number
            low, high = np.quantile(self.samples[:, column], [0.025, 0.975])
            table[name] = (float(self.parameters[column]), float(low), float(high))
        return table


def _logs(quantities: Sequence[Mapping[str, float]], factors: Sequence[str]) -> np.ndarray:
    """log of every factor's value `[n, factors]`; -inf where there was no pre-training."""
    values = np.array([[q[f] for f in factors] for q in quantities])
    return np.log(values, out=np.full_like(values, -np.inf), where=values > 0)


def _effects(observed: Sequence[tuple[bool, Setting]], known: Iterable[Setting]) -> np.ndarray:
    """Effects of each observation, 0 or 1 `[n, k]`: upcycling, each (method, steps) and each ensemble size of the known
    settings but the last, whose effect is 0."""
    known = list(known)
    samplings, ensembles = sorted({s[:2] for s in known})[:-1], sorted({s.ensemble for s in known})[:-1]
    rows = [[up, *(s[:2] == one for one in samplings), *(s.ensemble == one for one in ensembles)] for up, s in observed]
    return np.array(rows, dtype=np.float64)


def fit_surface(observations: Sequence[Observation], *, samples: int = 100, seed: int = 0) -> Surface:
    """Fit the surface by least squares of log error with weak priors; confidence by resampling runs.

    Raises UserError if fewer than four runs, or no factor that varies, were observed.
    """
    lengths = {o.quantities["pretrain"] for o in observations}
    if len(lengths - {0.0}) == 1:  # one length of pre-training alone cannot tell the effect of none
        observations = [o for o in observations if o.quantities["pretrain"]]
    runs = sorted({o.run_id for o in observations})
    values = {f: {o.quantities[f] for o in observations} for f in FACTORS}
    scratch = 0 in values["pretrain"]
    values["pretrain"] -= {0.0}
    factors = [f for f in FACTORS if len(values[f]) > 1]
    if len(runs) < _LEAST_RUNS or not factors:
        varied = f" that vary {', '.join(factors)}" if factors else ", which do not differ" if runs else ""
        raise UserError(
            f"a plan needs evaluations of at least {_LEAST_RUNS} models that differ in size or training, but there are "
            f"{len(runs)}{varied}; run a study first (docs/science.md)."
        )
    if any(o.error <= 0 for o in observations):
        raise UserError("an error of 0 or less was observed; a power law needs errors above 0.")
    raw = _logs([o.quantities for o in observations], factors)
    centre = raw.mean(axis=0, where=np.isfinite(raw))
    x = raw - centre
    y = np.log([o.error for o in observations])
    effects = _effects([(o.upcycled, o.setting) for o in observations], {o.setting for o in observations})
    best = min((_fit(x, y, effects, share) for share in (0.1, 0.5, 0.8)), key=lambda f: f[1])[0]
    rng = np.random.default_rng(seed)
    rows_of = {run: [i for i, o in enumerate(observations) if o.run_id == run] for run in runs}
    draws = []
    for _ in range(samples):
        rows = [i for run in rng.choice(runs, len(runs)) for i in rows_of[run]]
        draws.append(_fit(x[rows], y[rows], effects[rows], 0.5, start=best)[0])
    return Surface(
        factors=factors,
        ranges={f: (min(v, default=0.0), max(v, default=0.0)) for f, v in values.items()},
        settings={o.setting: o.recipe for o in observations},
        pretraining=next((o.pretraining for o in reversed(observations) if o.pretraining), None),
        seen={kind(o.setting.method, o.config, o.upcycled) for o in observations},
        usual_method=Counter({o.run_id: o.setting.method for o in observations}.values()).most_common(1)[0][0],
        upcycling=len({o.upcycled for o in observations}) > 1,
        scratch=scratch and "pretrain" in factors,
        centre=centre,
        parameters=best,
        samples=np.array(draws),
        residual=float(np.sqrt(np.mean((_log_error(best, x, effects) - y) ** 2))),
    )


def _log_error(p: np.ndarray, x: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """log error; p = log c, (log A_i, alpha_i)..., effects..., what training from scratch leaves."""
    found = np.logaddexp.reduce(_log_terms(p, x), axis=1)
    for column, effect in zip(effects.T, p[1 + 2 * x.shape[1] : -1], strict=True):
        found = found + column * effect
    return found


def _log_terms(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log c, and log A_i - alpha_i x_i of every factor, or what training from scratch leaves: `[n, 1 + factors]`."""
    count = x.shape[1]
    log_a, alpha = p[1 : 1 + 2 * count : 2], p[2 : 2 + 2 * count : 2]
    scratch = np.isneginf(x)
    terms = np.where(scratch, p[-1], log_a - alpha * np.where(scratch, 0.0, x))
    return np.concatenate([np.full((len(x), 1), p[0]), terms], axis=1)


def _fit(
    x: np.ndarray, y: np.ndarray, effects: np.ndarray, share: float, start: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """(Parameters, cost); `share` of the error starts as c. Priors: alpha 0.3 +- 0.3, every term +- 2, effects +- 1 in log."""
    from scipy.optimize import least_squares

    factors = x.shape[1]
    log_a, alpha = slice(1, 1 + 2 * factors, 2), slice(2, 2 + 2 * factors, 2)
    level = float(np.median(y))
    prior = np.zeros(1 + 2 * factors + effects.shape[1] + 1)
    spread = np.ones_like(prior)
    prior[0], spread[0] = level + math.log(0.3), 2.0
    prior[log_a], spread[log_a] = level + math.log(0.7 / factors), 2.0
    prior[alpha], spread[alpha] = 0.3, 0.3
    prior[-1], spread[-1] = prior[1], 2.0
    guess = prior.copy()
    guess[0] = level + math.log(share)
    guess[log_a] = level + math.log((1 - share) / factors)
    low, high = np.full_like(prior, -np.inf), np.full_like(prior, np.inf)
    low[alpha], high[alpha] = 0.0, 3.0
    guess = guess if start is None else np.clip(start, low + 1e-9, high - 1e-9)
    scratch = np.isneginf(x)

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.concatenate([_log_error(p, x, effects) - y, _PRIOR * (p - prior) / spread])

    def slopes(p: np.ndarray) -> np.ndarray:
        terms = _log_terms(p, x)
        parts = np.exp(terms - np.logaddexp.reduce(terms, axis=1)[:, None])  # shares of the terms in the sum
        of_laws = np.where(scratch, 0.0, parts[:, 1:])
        pairs = np.stack([of_laws, -of_laws * np.where(scratch, 0.0, x)], axis=2).reshape(len(x), -1)
        of_scratch = (parts[:, 1:] - of_laws).sum(axis=1, keepdims=True)
        of_errors = np.concatenate([parts[:, :1], pairs, effects, of_scratch], axis=1)
        return np.concatenate([of_errors, np.diag(_PRIOR / spread)])

    found = least_squares(residuals, guess, jac=slopes, bounds=(low, high))
    return found.x, float(found.cost)
