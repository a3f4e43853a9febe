"""Write one static HTML page about an experiment: results, pictures, lineage, curves, recipes, versions."""

import argparse
from pathlib import Path

from dpt.config.sections import TrackingConfig
from dpt.scaling.report import write_report


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="name of the MLflow experiment")
    parser.add_argument("--uri", default=TrackingConfig.uri, help="MLflow store (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    print(write_report(arguments.experiment, uri=arguments.uri, out=arguments.out))
