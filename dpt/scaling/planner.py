"""Spend a budget on model size, pre-training, fine-tuning, upcycling, sampler steps and ensemble, by a fitted surface."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dpt.config.recipe import Recipe
from dpt.config.sections import ModelConfig, UpcyclingConfig
from dpt.errors import UserError
from dpt.models import costs
from dpt.scaling.compute import prediction_macs
from dpt.scaling.observations import Observation, Setting, added_macs, factor_values, kind
from dpt.scaling.surface import Surface

_SHARES = np.round(np.linspace(0.02, 0.98, 49), 2)
"""Shares of the budget that pre-training may get, besides none."""
_UPCYCLED_SHARES = (0.25, 0.5)
"""Shares of the perception budget that may be spent after upcycling."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a budget is spent, and what is expected of it."""

    config: ModelConfig
    """The model before upcycling."""
    pretrain_samples: float
    """Samples of pre-training; 0: trained from scratch."""
    finetune_samples: float
    upcycle_samples: float
    """Samples of training after upcycling; 0: not upcycled."""
    upcycling: UpcyclingConfig
    setting: Setting
    """Method of fine-tuning, sampler steps and ensemble size."""
    train_macs: float
    test_macs: float
    """MACs of one prediction."""
    expected: float
    """The expected error."""

    @property
    def quantities(self) -> dict[str, float]:
        """The surface's factors."""
        return factor_values(self.config, self.pretrain_samples, self.finetune_samples + self.upcycle_samples)

    def distance(self, observation: Observation) -> tuple[bool, float, float]:
        """Distance of an observation from the plan: method and latents, then log factors, then its error to break ties."""
        its_kind = kind(observation.setting.method, observation.config, observation.upcycled)
        values = [(value, observation.quantities[name]) for name, value in self.quantities.items()]
        far = sum(math.log(mine / its) ** 2 if mine and its else 1.0 for mine, its in values if mine or its)
        return its_kind != kind(self.setting.method, self.config, self.upcycle_samples > 0), far, observation.error

    def extrapolations(self, surface: Surface) -> list[str]:
        """One sentence for each quantity outside the observed range."""
        sentences = []
        for name, value in self.quantities.items():
            low, high = surface.ranges[name]
            if name == "pretrain" and not value:
                continue  # models trained from scratch were observed
            if not low * 0.999 <= value <= high * 1.001:
                times = value / high if value > high else low / value
                side = "above" if value > high else "below"
                sentences.append(f"{name}: {value:.3g} is {times:.2g} times {side} the observed range [{low:.3g}, {high:.3g}].")
        return sentences


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on what a plan may spend."""

    train_macs: float
    """MACs of all stages together."""
    test_macs: float = np.inf
    """MACs of one prediction."""
    task: str = "depth"
    upcycling: UpcyclingConfig = field(default_factory=UpcyclingConfig)


def best_plan(surface: Surface, models: Sequence[ModelConfig], limits: Limits) -> Plan:
    """The plan with the least expected error among models, splits and observed test-time settings; UserError if none fits."""
    plans = []
    shares = [*_SHARES, 0.0] if surface.scratch else _SHARES
    for config, upcycled in itertools.product(models, (False, True) if surface.upcycling else (False,)):
        if upcycled and config.num_experts:
            continue
        setting = _best_setting(surface, config, upcycled, limits)
        if setting is not None:
            for share, late in itertools.product(shares, _UPCYCLED_SHARES if upcycled else (0.0,)):
                plans.append(make_plan(surface, config, limits, float(share), late, setting))
    return min(_within(plans, limits), key=lambda p: p.expected)


def naive_plan(surface: Surface, models: Sequence[ModelConfig], limits: Limits) -> Plan:
    """The middle model trained by the usual method, the budget split equally between stages, steps and ensemble as equal as the
    test-time limit allows."""
    config = sorted(models, key=lambda m: costs.macs(m).forward)[(len(models) - 1) // 2]
    settings = _affordable(surface, config, False, limits)
    settings = [s for s in settings if s.method == surface.usual_method] or settings
    plans = [make_plan(surface, config, limits, 0.5, 0.0, max(settings, key=_evenness))] if settings else []
    return _within(plans, limits)[0]


def _evenness(setting: Setting) -> tuple[int, int]:
    """Sort key that is greater for more equal steps and ensemble."""
    return min(setting.steps, setting.ensemble), -max(setting.steps, setting.ensemble)


def _within(plans: list[Plan], limits: Limits) -> list[Plan]:
    fitting = [p for p in plans if p.train_macs <= limits.train_macs * 1.001]
    if fitting:
        return fitting
    if plans:
        least = min(p.train_macs for p in plans)
        raise UserError(
            f"the budget of {limits.train_macs:.3g} MACs is below the least that a plan takes, {least:.3g}; raise it."
        )
    if math.isinf(limits.test_macs):
        raise UserError(
            "no model of the plan was observed as it would be trained: the runs have latents of another size, or are all "
            "upcycled; train and evaluate some of its kind first."
        )
    raise UserError(
        f"no observed setting predicts within {limits.test_macs:.3g} MACs per image; raise --test-macs-per-image, or evaluate "
        "smaller models and fewer steps first."
    )


def make_plan(
    surface: Surface, config: ModelConfig, limits: Limits, pretrain_share: float, upcycled_share: float, setting: Setting
) -> Plan:
    """The plan that gives pre-training this share of the budget and perception the rest, part of its samples upcycled.

    A stage whose length the observations do not vary keeps the observed one, as its effect is unknown. A share of 0 means
    training from scratch, where that was observed.
    """
    upcycled_config = limits.upcycling.apply(config) if upcycled_share else config
    per_pretrained = _sample_macs(surface.pretraining, config)
    per_tuned = _sample_macs(surface.settings[setting], config) * (1 - upcycled_share)
    per_tuned += _sample_macs(surface.settings[setting], upcycled_config) * upcycled_share
    pretrain = limits.train_macs * pretrain_share / per_pretrained
    tuned = limits.train_macs * (1 - pretrain_share) / per_tuned
    if "pretrain" not in surface.factors:
        pretrain = surface.ranges["pretrain"][0]
        tuned = max(0.0, limits.train_macs - pretrain * per_pretrained) / per_tuned
    if "finetune" not in surface.factors:
        tuned = surface.ranges["finetune"][0]
        if "pretrain" in surface.factors and not (surface.scratch and pretrain_share == 0):
            pretrain = max(0.0, limits.train_macs - tuned * per_tuned) / per_pretrained
    upcycled = upcycled_share > 0
    expected = np.inf
    if tuned > 0 and (pretrain > 0 or surface.scratch or not surface.ranges["pretrain"][1]):
        quantities = factor_values(config, pretrain, tuned)
        expected = surface.expected(quantities, upcycled=upcycled, setting=setting)
    return Plan(
        config=config,
        pretrain_samples=pretrain,
        finetune_samples=tuned * (1 - upcycled_share),
        upcycle_samples=tuned * upcycled_share,
        upcycling=limits.upcycling,
        setting=setting,
        train_macs=pretrain * per_pretrained + tuned * per_tuned,
        test_macs=_test_macs(config, upcycled, limits, setting),
        expected=expected,
    )


def _sample_macs(recipe: Recipe | None, config: ModelConfig) -> float:
    """MACs of training on a sample, including what the recipe's methods add."""
    return costs.macs(config).training + (added_macs(recipe, config) if recipe else 0.0)


def _test_macs(config: ModelConfig, upcycled: bool, limits: Limits, setting: Setting) -> float:
    forward = costs.macs(limits.upcycling.apply(config) if upcycled else config).forward
    return prediction_macs(forward, task=limits.task, steps=setting.steps, ensemble=setting.ensemble)


def _affordable(surface: Surface, config: ModelConfig, upcycled: bool, limits: Limits) -> list[Setting]:
    """The observed settings within the limit, of methods observed with latents of this size, upcycled or not."""
    settings = [s for s in sorted(surface.settings) if kind(s.method, config, upcycled) in surface.seen]
    return [s for s in settings if _test_macs(config, upcycled, limits, s) <= limits.test_macs]


def _best_setting(surface: Surface, config: ModelConfig, upcycled: bool, limits: Limits) -> Setting | None:
    """The affordable setting with the least error: its effect is a factor, so the split does not matter."""
    middle = {name: (low * high) ** 0.5 for name, (low, high) in surface.ranges.items()}

    def error(setting: Setting) -> float:
        return surface.expected(middle, upcycled=upcycled, setting=setting)

    return min(_affordable(surface, config, upcycled, limits), key=error, default=None)
