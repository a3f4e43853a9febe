"""Write a data set of synthetic scenes, in the layouts of real ones."""

import os
import sys
from pathlib import Path

from data_tools.synthesis.dataset import SynthesisConfig, synthesize
from data_tools.synthesis.generation import VARIETIES
from data_tools.synthesis.layouts import TASKS
from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, Range, numeric
from dpt.config.parser import Parser
from dpt.errors import UserError, reported


def parser() -> Parser:
    parser = Parser(prog="python -m data_tools.synthesis", description=__doc__)
    add, count, size = parser.add_argument, numeric(int, AT_LEAST_1), numeric(int, Range(least=16, most=4096))
    add("--out", type=Path, required=True, help="folder to make; one folder a data set inside")
    add("--scenes", type=count, default=2000, help="scenes in all splits together (default: %(default)s)")
    add("--size", type=size, default=128, help="width and height in pixels (default: %(default)s)")
    add("--seed", type=numeric(int, NOT_NEGATIVE), default=0, help="seed of all scenes (default: %(default)s)")
    add("--splits", default="train=0.9,val=0.1", help="shares of the splits (default: %(default)s)")
    add("--tasks", default=",".join(TASKS), help="layouts to write (default: %(default)s)")
    add("--variety", default="standard", choices=VARIETIES, help="how wide the ranges of the scenes' properties are")
    add("--workers", type=count, default=os.cpu_count() or 1, help="processes (default: one per core, %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; bad input, and files that cannot be written, end it with one sentence and exit code 2."""
    options = parser().parse_args(arguments)
    with reported("synthesis"):
        config = SynthesisConfig(
            scenes=options.scenes,
            size=options.size,
            seed=options.seed,
            splits=_parse_splits(options.splits),
            tasks=tuple(task.strip() for task in options.tasks.split(",")),
            variety=options.variety,
        )
        synthesize(options.out, config, workers=options.workers)
    return 0


def _parse_splits(text: str) -> dict[str, float]:
    shares: dict[str, float] = {}
    for entry in text.split(","):
        name, _, share = entry.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError:
            raise UserError(f"--splits {text!r}: {entry!r} is not NAME=SHARE, as in train=0.9,val=0.1.") from None
    return shares


if __name__ == "__main__":
    sys.exit(main())
