"""Fit power laws to runs: y = a x^b, or y = a x^b + c, with confidence, and draw them in log-log."""

import argparse
import dataclasses
import json
from pathlib import Path

from dpt.commands.options import add_run_options, selected_runs
from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, numeric
from dpt.errors import UserError
from dpt.scaling.figures import FigureSpec, draw, find
from dpt.scaling.points import X_NAMES


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    names = "; ".join(f"{name}: {text}" for name, text in X_NAMES.items())
    parser.add_argument("--x", default="macs", help=f"{names}; or a metric, or a numeric field (default: %(default)s)")
    parser.add_argument("--y", required=True, help="a metric, e.g. eval/depth/abs_rel, train/loss; 1-METRIC: one minus it")
    parser.add_argument("--group-by", default="", help="a law for each value of this field, tag or label")
    parser.add_argument("--steps", type=numeric(int, AT_LEAST_1), help="only evaluations with this many sampler steps")
    parser.add_argument("--ensemble", type=numeric(int, AT_LEAST_1), help="only evaluations with this ensemble size")
    parser.add_argument(
        "--predictions",
        type=numeric(int, NOT_NEGATIVE),
        default=0,
        help="with --x total_macs: predictions that the training serves",
    )
    parser.add_argument("--over", default="", metavar="TAG", help="draw runs that differ in this tag alone as their mean")
    parser.add_argument("--curve", action="store_true", help="all recorded values of a training metric, not the last alone")
    parser.add_argument("--frontier", action="store_true", help="one law through the least y that each x can buy (lower hull)")
    parser.add_argument("--offset", action="store_true", help="fit y = a x^b + c")
    parser.add_argument("--out", type=Path, help="draw the figure into this file (svg, png or pdf), its data beside it")
    parser.add_argument("--json", action="store_true", help="print laws and points as JSON")


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
