"""How an error depends on all that compute can buy at once: model size, pre-training, fine-tuning, upcycling, and test time.

error = (c + sum_i A_i x_i^-alpha_i) * upcycling * sampler * ensemble: a power law for each training quantity, added up with
what none of them removes (the parametric form of Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models",
equation 2), times the measured effects of the method of fine-tuning with its sampler steps, and of the ensemble size. Added
rather than multiplied, since then a budget has a best split inside its range. A constant stands for the term of pre-training
where there was none.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from dpt.config.recipe import DptConfig
from dpt.config.sections import (
    DataConfig,
    FeatureAlignmentConfig,
    ModelConfig,
    PixelLossConfig,
    SelfAlignmentConfig,
    TrainingConfig,
)
from dpt.errors import UserError
from dpt.models import costs
from dpt.models.decoder_costs import recipe_macs
from dpt.scaling.compute import section
from dpt.scaling.results import evaluation_rows
from dpt.scores import METRICS
from dpt.tracking.read import RunRecord, ancestors

FACTORS = {
    "model": "active parameters of the model before upcycling",
    "tokens": "tokens of an image",
    "pretrain": "pre-training samples",
    "finetune": "fine-tuning samples, those after upcycling included",
}
"""What may be varied in training, each with its unit."""
_PRIOR = 0.02  # how much a parameter's prior weighs against a residual of log error
_LEAST_RUNS = 4


METHODS = {
    "diffusion.timesteps": "uniform",
    "diffusion.prediction_type": "epsilon",
    "diffusion.beta_schedule": "linear",
    "pixel_loss.weight": "0.0",
    "training.bypass_share": "0.0",
    "training.self_alignment.weight": "0.0",
    "training.feature_alignment.weight": "0.0",
    "optimizer.type": "AdamW",
}
"""Fields of a fine-tuning that make another method of it: what differs between runs is chosen among, like sampler steps. With
their defaults, which older runs may not have recorded."""


class Setting(NamedTuple):
    """How a model was fine-tuned, and what its predictions take."""

    method: str
    """The METHODS that differ among the observations, as "field=value, ..."; empty if none do."""
    steps: int
    ensemble: int


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One evaluation of one trained model."""

    error: float
    """What is to be small: the metric, or one minus it."""
    config: ModelConfig
    """The model before upcycling."""
    quantities: dict[str, float]
    """Value of every factor."""
    upcycled: bool
    setting: Setting
    recipe: DptConfig
    """The parts of the fine-tuning's recipe that cost (`added_macs`)."""
    run_id: str
    """The trained run (several settings of one run are not independent)."""
    evaluation_id: str
    """The run that measured it."""


def observe(
    records: Sequence[RunRecord], family: Sequence[RunRecord], task: str, metric: str, *, dataset: str = ""
) -> list[Observation]:
    """What the evaluations of models trained for `task` say, of those among `records`, or of generalists if there are none: the
    two follow different laws. Models that were trained from scratch count, without pre-training; models that start from weights
    of no known run (imported ones) do not, as nobody can say what those took.

    Raises UserError if they are of several data sets and none is named.
    """
    found: list[tuple[str, str, Observation]] = []  # (trained for, data set, ...)
    fields: dict[str, dict[str, str]] = {}  # by the trained run
    for record in records:
        rows = [r for r in evaluation_rows(record) if r.run is not None and r.task == task and metric in r.metrics]
        line = [r for r in ancestors(record, family) if r.stage != "evaluate"]
        samples = {stage: sum(_samples(r) for r in line if r.stage == stage) for stage in ("pretrain", "finetune", "upcycle")}
        config = section(_before_upcycling(line), "model", ModelConfig) if line else None
        trained = line[0].params.get("task", task) if line else ""
        if config is None or trained not in (task, "generalist"):
            continue
        if not samples["pretrain"] and not _from_scratch(line[-1]):
            continue
        fields[line[0].run_id] = {name: line[0].params.get(name, default) for name, default in METHODS.items()}
        quantities = factor_values(config, samples["pretrain"], samples["finetune"] + samples["upcycle"])
        for row in rows:
            if dataset in ("", row.dataset):
                value = row.metrics[metric]
                observation = Observation(
                    error=value if METRICS[metric].lower_is_better else 1 - value,
                    config=config,
                    quantities=quantities,
                    upcycled=samples["upcycle"] > 0,
                    setting=Setting("", row.steps or 0, row.ensemble or 0),
                    recipe=_costing(line[0]),
                    run_id=line[0].run_id,
                    evaluation_id=record.run_id,
                )
                found.append((trained, row.dataset, observation))
    chosen = task if any(trained == task for trained, *_ in found) else "generalist"
    found = [one for one in found if one[0] == chosen]
    if len(datasets := {name for _, name, _ in found}) > 1:
        raise UserError(f"the evaluations are of {', '.join(sorted(datasets))}; choose one with --dataset.")
    return _with_methods([observation for *_, observation in found], fields)


def _with_methods(observations: Sequence[Observation], fields: Mapping[str, Mapping[str, str]]) -> list[Observation]:
    """The observations with the methods named in which they differ; `fields` has those of each trained run."""
    used = [fields[o.run_id] for o in observations]
    varied = [name for name in METHODS if len({values[name] for values in used}) > 1]
    names = [", ".join(f"{name}={values[name]}" for name in varied) for values in used]
    return [replace(o, setting=o.setting._replace(method=name)) for o, name in zip(observations, names, strict=True)]


def _costing(record: RunRecord) -> DptConfig:
    """The parts of a fine-tuning's recipe that make its samples dearer than the network alone."""
    given = {name: record.params.get(f"training.{name}") for name in ("bypass_share", "bypass_first", "bypass_last")}
    bypass: dict[str, Any] = {name: json.loads(value) for name, value in given.items() if value is not None}
    training = TrainingConfig(
        **bypass,
        self_alignment=section(record, "training.self_alignment", SelfAlignmentConfig) or SelfAlignmentConfig(),
        feature_alignment=section(record, "training.feature_alignment", FeatureAlignmentConfig) or FeatureAlignmentConfig(),
    )
    return DptConfig(
        pixel_loss=section(record, "pixel_loss", PixelLossConfig) or PixelLossConfig(),
        data=section(record, "data", DataConfig) or DataConfig(),
        training=training,
    )


def added_macs(recipe: DptConfig, config: ModelConfig) -> float:
    """MACs that a recipe's methods add to each sample of a dense model's fine-tuning, or save (tokens that bypass blocks)."""
    return float(recipe_macs(recipe, config).training - costs.macs(config).training)


def factor_values(config: ModelConfig, pretrain_samples: float, finetune_samples: float) -> dict[str, float]:
    """The value of every factor for a model before upcycling, and its training; no pre-training: trained from scratch."""
    return {
        "model": float(costs.num_params(config).active),
        "tokens": float(costs.num_tokens(config)),
        "pretrain": pretrain_samples,
        "finetune": finetune_samples,
    }


def _before_upcycling(line: Sequence[RunRecord]) -> RunRecord:
    """Of a line of runs, newest first, the newest one that its upcycling started from; without upcycling the newest."""
    upcycled = [place for place, run in enumerate(line) if run.stage == "upcycle"]
    older = line[upcycled[-1] + 1 :] if upcycled else line
    return older[0] if older else line[-1]


def _from_scratch(record: RunRecord) -> bool:
    return not record.parents and not record.params.get("training.weights")


def _samples(record: RunRecord) -> float:
    return record.metrics.get("train/samples_seen", 0.0)


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A fitted dependence, with bootstrap fits for confidence."""

    factors: list[str]
    """Factors that the observations vary; the others have no say."""
    ranges: dict[str, tuple[float, float]]
    """Least and greatest observed value of every factor, in pre-training beside none at all."""
    settings: dict[Setting, DptConfig]
    """Those observed, each with the parts of its method's recipe that cost (`added_macs`)."""
    seen: set[tuple[str, int, bool]]
    """What was observed together: method, side of the latents (`input_size`), and whether upcycled."""
    usual_method: str
    """That of most runs."""
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
        samplings, ensembles = _levels(self.settings)
        levels = np.array([[upcycled, samplings.index(setting[:2]), ensembles.index(setting.ensemble)]])
        shape = (len(self.factors), len(samplings), len(ensembles))
        return np.exp([_log_error(p, x, levels, shape)[0] for p in fits])

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


def _levels(settings: Iterable[Setting]) -> tuple[list[tuple[str, int]], list[int]]:
    """The levels of the two effects of a setting, in order: (method, steps), and ensemble sizes."""
    settings = list(settings)
    return sorted({(s.method, s.steps) for s in settings}), sorted({s.ensemble for s in settings})


def fit_surface(observations: Sequence[Observation], *, samples: int = 100, seed: int = 0) -> Surface:
    """Fit the surface by least squares of log error with weak priors; confidence by resampling runs.

    Raises UserError if fewer than four runs, or no factor that varies, were observed.
    """
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
    samplings, ensembles = _levels(o.setting for o in observations)
    raw = _logs([o.quantities for o in observations], factors)
    centre = raw.mean(axis=0, where=np.isfinite(raw))
    x = raw - centre
    y = np.log([o.error for o in observations])
    levels = np.array([[o.upcycled, samplings.index(o.setting[:2]), ensembles.index(o.setting.ensemble)] for o in observations])
    shape = (len(factors), len(samplings), len(ensembles))
    best = min((_fit(x, y, levels, shape, share) for share in (0.1, 0.5, 0.8)), key=lambda f: f[1])[0]
    rng = np.random.default_rng(seed)
    rows_of = {run: [i for i, o in enumerate(observations) if o.run_id == run] for run in runs}
    draws = []
    for _ in range(samples):
        rows = [i for run in rng.choice(runs, len(runs)) for i in rows_of[run]]
        draws.append(_fit(x[rows], y[rows], levels[rows], shape, 0.5, start=best)[0])
    return Surface(
        factors=factors,
        ranges={f: (min(v, default=0.0), max(v, default=0.0)) for f, v in values.items()},
        settings={o.setting: o.recipe for o in observations},
        seen={(o.setting.method, o.config.input_size, o.upcycled) for o in observations},
        usual_method=Counter({o.run_id: o.setting.method for o in observations}.values()).most_common(1)[0][0],
        upcycling=len({o.upcycled for o in observations}) > 1,
        scratch=scratch and "pretrain" in factors,
        centre=centre,
        parameters=best,
        samples=np.array(draws),
        residual=float(np.sqrt(np.mean((_log_error(best, x, levels, shape) - y) ** 2))),
    )


def _log_error(p: np.ndarray, x: np.ndarray, levels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """log error; p = log c, (log A_i, alpha_i)..., upcycling, steps..., ensembles..., scratch (last steps, ensemble: 0)."""
    factors, steps, ensembles = shape
    rest = p[1 + 2 * factors :]
    of_steps = np.append(rest[1:steps], 0.0)
    of_ensembles = np.append(rest[steps : steps + ensembles - 1], 0.0)
    base = np.logaddexp.reduce(_log_terms(p, x), axis=1)
    return base + rest[0] * levels[:, 0] + of_steps[levels[:, 1]] + of_ensembles[levels[:, 2]]


def _log_terms(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log c, and log A_i - alpha_i x_i of every factor, or what training from scratch leaves: `[n, 1 + factors]`."""
    count = x.shape[1]
    log_a, alpha = p[1 : 1 + 2 * count : 2], p[2 : 2 + 2 * count : 2]
    scratch = np.isneginf(x)
    terms = np.where(scratch, p[-1], log_a - alpha * np.where(scratch, 0.0, x))
    return np.concatenate([np.full((len(x), 1), p[0]), terms], axis=1)


def _fit(
    x: np.ndarray,
    y: np.ndarray,
    levels: np.ndarray,
    shape: tuple[int, int, int],
    share: float,
    start: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """(Parameters, cost); `share` of the error starts as c. Priors: alpha 0.3 +- 0.3, every term +- 2, settings +- 1 in log."""
    from scipy.optimize import least_squares

    factors, steps, ensembles = shape
    level = float(np.median(y))
    prior = np.zeros(1 + 2 * factors + 1 + (steps - 1) + (ensembles - 1) + 1)
    spread = np.ones_like(prior)
    prior[0], spread[0] = level + math.log(0.3), 2.0
    prior[1 : 1 + 2 * factors : 2], spread[1 : 1 + 2 * factors : 2] = level + math.log(0.7 / factors), 2.0
    prior[2 : 2 + 2 * factors : 2], spread[2 : 2 + 2 * factors : 2] = 0.3, 0.3
    prior[-1], spread[-1] = prior[1], 2.0
    guess = prior.copy()
    guess[0] = level + math.log(share)
    guess[1 : 1 + 2 * factors : 2] = level + math.log((1 - share) / factors)
    low, high = np.full_like(prior, -np.inf), np.full_like(prior, np.inf)
    low[2 : 2 + 2 * factors : 2], high[2 : 2 + 2 * factors : 2] = 0.0, 3.0
    guess = guess if start is None else np.clip(start, low + 1e-9, high - 1e-9)

    scratch = np.isneginf(x)
    settings = np.zeros((len(x), len(prior) - 1 - 2 * factors))  # slopes of the settings' effects
    settings[:, 0] = levels[:, 0]
    settings[:, 1:steps] = levels[:, 1, None] == np.arange(steps - 1)
    settings[:, steps:-1] = levels[:, 2, None] == np.arange(ensembles - 1)

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.concatenate([_log_error(p, x, levels, shape) - y, _PRIOR * (p - prior) / spread])

    def slopes(p: np.ndarray) -> np.ndarray:
        terms = _log_terms(p, x)
        parts = np.exp(terms - np.logaddexp.reduce(terms, axis=1)[:, None])  # shares of the terms in the sum
        of_laws = np.where(scratch, 0.0, parts[:, 1:])
        pairs = np.stack([of_laws, -of_laws * np.where(scratch, 0.0, x)], axis=2).reshape(len(x), -1)
        settings[:, -1] = (parts[:, 1:] - of_laws).sum(axis=1)
        return np.concatenate([np.concatenate([parts[:, :1], pairs, settings], axis=1), np.diag(_PRIOR / spread)])

    found = least_squares(residuals, guess, jac=slopes, bounds=(low, high))
    return found.x, float(found.cost)
