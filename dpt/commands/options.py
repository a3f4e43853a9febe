"""Options that several commands share."""

import argparse

from dpt.config.sections import TrackingConfig
from dpt.errors import UserError
from dpt.tracking.read import RunRecord, load_runs, with_ancestors


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Which runs: named ones, or those of an experiment, filtered."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run ids (ours, MLflow's, or their beginnings) or names")
    parser.add_argument("--experiment", help="all runs of this experiment")
    parser.add_argument("--filter", default="", help="MLflow search condition, e.g. \"params.task = 'depth'\"")
    parser.add_argument("--uri", default=TrackingConfig.uri, help="MLflow store (default: %(default)s)")


def selected_runs(arguments: argparse.Namespace) -> tuple[list[RunRecord], list[RunRecord]]:
    """(The chosen runs, those and all their ancestors); UserError if none is chosen."""
    if not arguments.runs and not arguments.experiment:
        raise UserError("no run is chosen; name runs, or an experiment with --experiment.")
    records = load_runs(arguments.uri, arguments.experiment, arguments.runs or None, arguments.filter)
    if not records:
        raise UserError(f"no run of {arguments.uri} fits; check --experiment and --filter.")
    return records, with_ancestors(records, arguments.uri)
