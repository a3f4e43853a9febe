"""Send MLflow the records that a server outage left in run folders; none arrives twice."""

import argparse
from pathlib import Path

from dpt.errors import UserError
from dpt.tracking.sender import sync


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, help="output folder of a run, or one above several")
    add("--uri", default="", help="another store than the runs name")
    add("--again", action="store_true", help="send all records, for a store that has lost them")


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
