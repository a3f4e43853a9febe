"""The parser of all command lines except launchers': mistakes are reported in one sentence, with exit code 2."""

import argparse
from typing import NoReturn

from dpt.config.numbers import Number


class _Help(argparse.HelpFormatter):
    """Help that adds to every option's text the numbers it takes and its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text is None or text == argparse.SUPPRESS:
            return text
        if isinstance(action.type, Number):
            text += f" [{action.type}]"
        silent = action.default is None or action.default is False or action.default in ("", [], argparse.SUPPRESS)
        return text if silent or "default" in text else f"{text} (default: {_plain(action.default)})"


def _plain(default: object) -> str:
    """Show a default as it would be typed."""
    values = default if isinstance(default, list | tuple) else [default]
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values).replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """argparse's parser without abbreviated options or usage before an error; its help shows ranges and defaults."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help lists the options).\n")
