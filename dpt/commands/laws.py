"""Fit power laws to runs: y = a x^b, or y = a x^b + c, with confidence, and draw them in log-log."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from dpt.commands.options import add_run_options, selected_runs
from dpt.errors import UserError
from dpt.scaling.laws import Fit, fit_power_law, frontier
from dpt.scaling.plots import law_figure, save
from dpt.scaling.points import X_NAMES, Point, collect


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    names = "; ".join(f"{name}: {text}" for name, text in X_NAMES.items())
    parser.add_argument("--x", default="macs", help=f"{names}; or a metric, or a numeric field (default: %(default)s)")
    parser.add_argument("--y", required=True, help="a metric, e.g. eval/depth/abs_rel, train/loss; 1-METRIC: one minus it")
    parser.add_argument("--group-by", default="", help="a law for each value of this field, tag or label")
    parser.add_argument("--steps", type=int, help="only evaluations with this many sampler steps")
    parser.add_argument("--ensemble", type=int, help="only evaluations with this ensemble size")
    parser.add_argument("--curve", action="store_true", help="all recorded values of a training metric, not the last alone")
    parser.add_argument("--frontier", action="store_true", help="one law through the least y that each x can buy (lower hull)")
    parser.add_argument("--offset", action="store_true", help="fit y = a x^b + c")
    parser.add_argument("--out", type=Path, help="draw the figure into this file (svg, png or pdf)")
    parser.add_argument("--json", action="store_true", help="print laws and points as JSON")


def run(arguments: argparse.Namespace) -> None:
    records, family = selected_runs(arguments)
    points = collect(
        records,
        family,
        arguments.x,
        arguments.y,
        group_by=arguments.group_by,
        steps=arguments.steps,
        ensemble=arguments.ensemble,
        curve=arguments.curve,
    )
    groups = {name: [p for p in points if p.group == name] for name in dict.fromkeys(p.group for p in points)}
    chosen: list[Point] = []
    if arguments.frontier:
        chosen = [points[i] for i in frontier([p.x for p in points], [p.y for p in points])]
    fits, refusals = _fits({"": chosen} if arguments.frontier else groups, arguments.offset)
    if arguments.out is not None:
        pairs = {name: [(p.x, p.y) for p in group] for name, group in groups.items()}
        ringed = [(p.x, p.y) for p in chosen]
        joined = arguments.frontier and not arguments.curve
        save(law_figure(pairs, fits, arguments.x, arguments.y, chosen=ringed, join=joined), arguments.out)
    if arguments.json:
        print(json.dumps(_as_json(fits, points), indent=1))
    else:
        for name, fit in fits.items():
            print(f"{name + ': ' if name else ''}{fit.sentence(arguments.y, arguments.x)}")
    if refusals:
        raise UserError(" ".join(refusals))


def _fits(groups: dict[str, list[Point]], offset: bool) -> tuple[dict[str, Fit], list[str]]:
    """A law for each group that can carry one, and why the others cannot."""
    fits, refusals = {}, []
    for name, group in groups.items():
        try:
            fits[name] = fit_power_law([p.x for p in group], [p.y for p in group], offset=offset)
        except UserError as error:
            refusals.append(f"{name}: {error}" if name else str(error))
    return fits, refusals


def _as_json(fits: dict[str, Fit], points: list[Point]) -> dict[str, object]:
    laws = {
        name: {
            **asdict(fit.law),
            "equation": fit.law.equation(),
            "interval_a": fit.interval_a,
            "interval_b": fit.interval_b,
            "interval_c": fit.interval_c,
            "r2": fit.r2,
            "holdout_error": fit.holdout_error,
        }
        for name, fit in fits.items()
    }
    return {"laws": laws, "points": [{"x": p.x, "y": p.y, "group": p.group, "run": p.run.run_id} for p in points]}
