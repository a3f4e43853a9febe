"""`--help` of every command: each option has a meaning, its choices or its range, and its default."""

import argparse
import importlib
import re
import runpy
from pathlib import Path

import pytest

from dpt import cli
from dpt.config.numbers import Number
from dpt.config.parser import Parser

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    "data_tools.encode",
    "data_tools.inspect",
    "data_tools.synthesis.__main__",
    "data_tools.native.__main__",
    "data_tools.train_vae",
]
NAMES = [*(f"dpt {name}" for name in cli.COMMANDS), *MODULES, "quickstart"]


def parser_of(name: str) -> Parser:
    """The parser of a command, by its name in NAMES. Those of pretrain, finetune, upcycle and evaluate are made of the
    recipe's sections (test_command_lines.py)."""
    if name == "quickstart":
        return runpy.run_path(str(ROOT / "launchers" / "quickstart.py"))["parser"]()
    if not name.startswith("dpt "):
        return importlib.import_module(name).parser()
    module = importlib.import_module(cli.module_name(name.removeprefix("dpt ")))
    parser = Parser(name, module.__doc__)
    module.configure(parser)
    return parser


def options_of(parser: Parser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_says_what_it_is_and_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    parser = parser_of(name)
    shown = parser.format_help().splitlines()
    for action in options_of(parser):
        option = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
        (at,) = [number for number, text in enumerate(shown) if re.match(rf"  {re.escape(option)}(?![\w-])", text)]
        line = " ".join(shown[at : at + 2])  # a long option's help is on the line below it
        meaning = re.sub(r"\((default|%).*?\)|\[.*?\]", "", action.help or "").strip()
        assert len(meaning) >= 5, f"{name} {option}: {action.help!r} is no meaning"
        assert action.type not in (int, float) or action.choices, f"{name} {option}: give it a range (dpt.config.numbers)"
        if isinstance(action.type, Number):
            assert str(action.type) in line, line
        if action.choices:
            assert all(str(choice) in line for choice in action.choices), line
        if action.option_strings and action.nargs != 0 and not action.required:
            told = "default" in line or action.default in (None, "", [])
            assert told, line


def test_ranges_and_defaults_are_added_where_the_text_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    from dpt.config.numbers import AT_LEAST_1, POSITIVE, numeric

    parser = Parser("p", None)
    parser.add_argument("--a", type=numeric(int, AT_LEAST_1), default=3, help="apples")
    parser.add_argument("--b", type=numeric(float, POSITIVE), default=1e-4, help="bread (default: as much as there is)")
    parser.add_argument("--c", type=numeric(int), default=0, help="cups")
    parser.add_argument("--d", default="", help="dust")
    parser.add_argument("--e", nargs=2, default=(0.0, 1.0), help="ends")
    text = " ".join(parser.format_help().split())
    for words in (
        "--a A apples [whole number at least 1] (default: 3)",
        "bread (default: as much as there is) [number above 0]",
        "cups [whole number] (default: 0)",
        "--d D dust --e",
        "ends (default: 0 1)",
    ):
        assert words in text
