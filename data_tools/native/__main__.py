"""Write tiny synthetic data sets in their native layouts (docs/readers.md), to try commands on before the downloads."""

from pathlib import Path

from data_tools.native.sets import WRITERS, write_sets
from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, numeric
from dpt.config.parser import Parser
from dpt.errors import reported


def parser() -> Parser:
    parser = Parser(prog="python -m data_tools.native", description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"sets to write (default: all): {', '.join(WRITERS)}")
    add("--out", type=Path, required=True, help="folder; each set goes to the folder of its name in it")
    add("--samples", type=numeric(int, AT_LEAST_1), default=4, help="samples of each split (default: %(default)s)")
    add("--seed", type=numeric(int, NOT_NEGATIVE), default=0, help="seed of all scenes (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; bad input ends it with one sentence and exit code 2."""
    with reported("native"):
        arguments = parser().parse_args(argv)
        for root in write_sets(arguments.out, arguments.names, samples=arguments.samples, seed=arguments.seed):
            print(root)


if __name__ == "__main__":
    main()
