"""Fit power laws to runs: y = a x^b, or y = a x^b + c, with confidence intervals, and plot them."""

import argparse
import dataclasses
import json
from pathlib import Path

from dpt.commands.options import add_run_options, selected_runs
from dpt.config.numbers import COUNT, NATURAL
from dpt.errors import UserError
from dpt.scaling.figures import FigureSpec, draw, find
from dpt.scaling.points import X_NAMES


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    add, names = parser.add_argument, "; ".join(f"{name}: {text}" for name, text in X_NAMES.items())
    add("--x", default="macs", help=f"{names}; or a metric, or a numeric field")
    add("--y", required=True, help="a metric, e.g. eval/depth/abs_rel, train/loss; 1-METRIC: one minus it")
    add("--group-by", default="", help="fit one law per value of this field, tag or label")
    add("--steps", type=COUNT, help="only evaluations with this many sampler steps")
    add("--ensemble", type=COUNT, help="only evaluations with this ensemble size")
    add("--predictions", type=NATURAL, default=0, help="with --x total_macs: predictions to count")
    add("--over", default="", metavar="TAG", help="replace runs that differ only in this tag by their mean")
    add("--curve", action="store_true", help="all recorded values of a training metric, not just the last")
    add("--frontier", action="store_true", help="one law through the least y for each x (lower convex hull)")
    add("--offset", action="store_true", help="fit y = a x^b + c")
    add("--out", type=Path, help="write the figure to this file (svg, png or pdf), its data beside it")
    add("--json", action="store_true", help="print laws and points as JSON")


def run(arguments: argparse.Namespace) -> None:
    records, family = selected_runs(arguments)
    names = {f.name for f in dataclasses.fields(FigureSpec)}
    findings = find(records, family, FigureSpec(**{k: v for k, v in vars(arguments).items() if k in names}))
    if arguments.out is not None:
        draw(findings, arguments.out)
    if arguments.json:
        print(json.dumps(findings.as_json(), indent=1))
    else:
        print("\n".join(findings.sentences()))
    if findings.refusals:
        raise UserError(" ".join(findings.refusals))
