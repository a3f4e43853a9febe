"""Send to MLflow what an outage of its server has kept in the folders of runs; nothing arrives twice."""

import argparse
from pathlib import Path

from dpt.errors import UserError
from dpt.tracking.sender import sync


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="output folder of a run, or one above several")
    parser.add_argument("--uri", default="", help="another store than the one that the runs name")
    parser.add_argument("--again", action="store_true", help="send every record, for a store that has lost the runs")


def run(arguments: argparse.Namespace) -> None:
    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder}: there is no such folder.")
    outcomes = sync(arguments.folder, uri=arguments.uri, again=arguments.again)
    for spool, problem in outcomes:
        refused = f", but for {spool.state.rejected} that MLflow refused for good" if spool.state.rejected else ""
        print(f"{spool.folder.parent}: run {spool.run_id}: {problem or f'all is sent{refused}'}")
    if not outcomes:
        raise UserError(f"{arguments.folder}: no run has left records here.")
    if any(problem for _, problem in outcomes):
        raise UserError(
            "some records have not been sent, for the reasons above; they are kept, and `dpt sync` sends them later."
        )
