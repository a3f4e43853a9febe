"""Plan a budget: the best split among model size, pre-training, fine-tuning, upcycling and test time, from a study's runs."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from dpt.commands.options import add_run_options, selected_runs
from dpt.config.numbers import COUNT, POSITIVE, Range, numeric
from dpt.config.presets import preset_values
from dpt.config.sections import UpcyclingConfig
from dpt.errors import UserError
from dpt.models.costs import num_params
from dpt.scaling.compute import section
from dpt.scaling.observations import FACTORS, Observation, observe
from dpt.scaling.plan_files import write_plan
from dpt.scaling.planner import Limits, Plan, best_plan, naive_plan
from dpt.scaling.results import show_macs
from dpt.scaling.surface import Surface, fit_surface
from dpt.scores import MAIN_METRIC, METRICS, show


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    add = parser.add_argument
    add("--budget", type=numeric(float, POSITIVE), required=True, help="MACs of all training, e.g. 1e18")
    up_to_inf = numeric(float, Range(above=0, most=math.inf))
    add("--test-macs-per-image", type=up_to_inf, default=math.inf, help="most MACs of one prediction (default: any)")
    add("--task", default="depth", choices=sorted(MAIN_METRIC), help="whose evaluations count")
    add("--metric", default="", help=f"metric to optimise: {', '.join(METRICS)} (default: the task's main metric)")
    add("--dataset", default="", help="evaluation set, if the runs have several")
    add("--models", nargs="+", default=[], metavar="PRESET", help="further models to consider, by preset")
    add("--out", type=Path, help="write the plan's recipes and a study that runs them into this folder")
    add("--seeds", type=COUNT, default=1, help="with --out: seeds that the study trains with")
    add("--naive", action="store_true", help="with --out: also the naive plan's, to compare the two")


def run(arguments: argparse.Namespace) -> None:
    metric = arguments.metric or MAIN_METRIC[arguments.task]
    if metric not in METRICS:
        raise UserError(f"--metric {metric}: choose one of {', '.join(METRICS)}.")
    records, family = selected_runs(arguments)
    observations = observe(records, family, arguments.task, metric, dataset=arguments.dataset)
    surface = fit_surface(observations)
    models = list(dict.fromkeys(o.config for o in observations))
    models += [dataclasses.replace(models[-1], **preset_values(name)) for name in arguments.models]
    upcycling = next((section(r, "upcycling", UpcyclingConfig) for r in family if r.stage == "upcycle"), UpcyclingConfig())
    limits = Limits(
        train_macs=arguments.budget, test_macs=arguments.test_macs_per_image, task=arguments.task, upcycling=upcycling
    )
    plan, naive = best_plan(surface, models, limits), naive_plan(surface, models, limits)
    print(_learned(surface, observations))
    print("\n" + describe(plan, surface, metric))
    print(f"\nFor comparison, the middle model with equal shares: {_expectation(naive, surface, metric)}.")
    if arguments.out is not None:
        experiment = f"{records[0].experiment}-plan"
        for name, one in (("best", plan), ("naive", naive)) if arguments.naive else (("best", plan),):
            nearest = min(observations, key=one.distance).evaluation_id
            example = next(r for r in records if r.run_id == nearest)
            path = write_plan(one, example, family, arguments.out / name, experiment=experiment, seeds=arguments.seeds)
            print(f"Run the {name} plan with: dpt study {path}")


def _learned(surface: Surface, observations: Sequence[Observation]) -> str:
    """Summary of what the observations show, and what they do not."""
    models = len({o.run_id for o in observations})
    lines = [f"From {len(observations)} evaluations of {models} models (residual {surface.residual:.1%}):"]
    for name, (alpha, low, high) in surface.exponents().items():
        least, most = surface.ranges[name]
        lines.append(f"  {FACTORS[name]}: exponent -{alpha:.3f} [{low:.3f}, {high:.3f}] on {least:.3g} to {most:.3g}")
    if surface.scratch:
        lines.append("  models trained from scratch were among them")
    fixed = [text for name, text in FACTORS.items() if name not in surface.factors]
    fixed += [] if surface.upcycling else ["upcycling"]
    if fixed:
        lines.append(f"  not varied, so kept as it was: {'; '.join(fixed)}")
    return "\n".join(lines)


def describe(plan: Plan, surface: Surface, metric: str) -> str:
    """Describe the plan in words."""
    config = plan.config
    experts = f", {config.num_experts} experts of which a token takes {config.top_k}" if config.num_experts else ""
    lines = [
        f"Plan for {show_macs(plan.train_macs)}MACs of training and {show_macs(plan.test_macs)}MACs per prediction:",
        f"  model        hidden {config.hidden_size}, depth {config.depth}, heads {config.num_heads}, "
        f"{num_params(config).total / 1e6:.1f} M parameters, latents {config.input_size} x {config.input_size}{experts}",
        f"  pre-train    {f'{plan.pretrain_samples:.4g} samples' if plan.pretrain_samples else 'no, trained from scratch'}",
        f"  fine-tune    {plan.finetune_samples:.4g} samples",
        *([f"  method       {plan.setting.method}"] if plan.setting.method else []),
        f"  upcycle      {f'{plan.upcycle_samples:.4g} samples' if plan.upcycle_samples else 'no'}",
        f"  test time    {plan.setting.steps} steps, ensemble of {plan.setting.ensemble}",
        f"  expected     {_expectation(plan, surface, metric)}",
    ]
    beyond = plan.extrapolations(surface)
    lines += [f"  EXTRAPOLATES {sentence}" for sentence in beyond] or ["  all within what was observed"]
    return "\n".join(lines)


def _expectation(plan: Plan, surface: Surface, metric: str) -> str:
    upcycled = plan.upcycle_samples > 0
    ends = surface.interval(plan.quantities, upcycled=upcycled, setting=plan.setting)
    values = [e if METRICS[metric].lower_is_better else 1 - e for e in (plan.expected, *ends)]
    low, high = sorted(values[1:])
    return f"{METRICS[metric].title} {show(metric, values[0])}, 95% [{show(metric, low)}, {show(metric, high)}]"
