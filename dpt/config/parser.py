"""The parser of all command lines but those of launchers: what is wrong is said in one sentence, with exit code 2."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviated options, and without the usage before an error."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help lists the options).\n")
