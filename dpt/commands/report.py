"""Write a static HTML page about an experiment: results, pictures, lineage, curves, recipes, versions."""

import argparse
from pathlib import Path

from dpt.config.sections import TrackingConfig
from dpt.scaling.report import write_report


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("experiment", help="name of the MLflow experiment")
    add("--uri", default=TrackingConfig.uri, help="MLflow store")
    add("--out", type=Path, default=Path("report.html"), help="file to write")


def run(arguments: argparse.Namespace) -> None:
    print(write_report(arguments.experiment, uri=arguments.uri, out=arguments.out))
