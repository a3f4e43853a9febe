"""The command line of a launcher: `--ds_config FILE`, any field by its dotted name, and help that lists them all."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, cast, get_type_hints

from dpt.config.recipe import DEEPSPEED_KEYS, DptConfig, Recipe, load_recipe
from dpt.errors import UserError


def parse_command(prog: str, description: str, home: str, argv: Sequence[str] | None = None) -> Recipe:
    """Parse a launcher's command line into a recipe.

    Fields of the section `home` may be written without it (evaluate: `--steps 1,5`). `--local_rank`, which the DeepSpeed
    launcher appends, is accepted and ignored. `--help` prints every field and exits 0. Raises UserError.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print_help(prog, description, home)
        sys.exit(0)
    sections = get_type_hints(DptConfig)
    bare = get_type_hints(sections[home])
    recipe_path: str | None = None
    overrides: dict[str, Any] = {}
    for name, value in _pairs(arguments):
        if name in ("ds_config", "deepspeed_config"):
            recipe_path = value
        elif name in ("local_rank", "deepspeed"):
            continue
        elif name in bare or (name.split(".")[0] in bare and name.split(".")[0] not in sections):
            overrides[f"{home}.{name}"] = value
        elif "." not in name and name not in DEEPSPEED_KEYS and name not in sections:
            close = get_close_matches(name, [*bare, *sections, *DEEPSPEED_KEYS], n=1)
            fix = f"did you mean --{close[0]}?" if close else "--help lists the fields."
            raise UserError(f"there is no field --{name}; {fix}")
        else:
            overrides[name] = value
    return load_recipe(recipe_path, overrides)


def _pairs(arguments: list[str]) -> list[tuple[str, str]]:
    pairs = []
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--"):
            raise UserError(f'unexpected argument "{argument}"; fields are set as --section.field VALUE, lists with commas.')
        name, equals, value = argument[2:].partition("=")
        if not equals:
            if name == "deepspeed":  # DeepSpeed's customary flag without a value
                continue
            if not arguments or (arguments[0].startswith("--") and not _is_number(arguments[0])):
                raise UserError(f"--{name} needs a value.")
            value = arguments.pop(0)
        pairs.append((name, value))
    return pairs


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def sections_of(config: type, prefix: str = "") -> list[str]:
    """The dotted names of the sections of a config, including nested ones."""
    names = []
    for name, hint in get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            names += [f"{prefix}{name}", *sections_of(cast(type, hint), f"{prefix}{name}.")]
    return names


def print_help(prog: str, description: str, home: str) -> None:
    """Print usage, then every field with its type, default, meaning and unit."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = f"deepspeed launchers/{prog}.py --ds_config FILE [--FIELD VALUE ...]"
    parser = ArgumentParser(prog=prog, usage=usage, description=description, add_help=False, default_env=False)
    parser.add_class_arguments(DptConfig)
    whole = sections_of(DptConfig)
    for action in parser._actions:  # sections as files, and lists that grow, are jsonargparse's and not ours
        action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
        if action.dest in whole:
            action.help = argparse.SUPPRESS
    parser.epilog = (
        '--ds_config FILE is the recipe: JSON with DeepSpeed\'s keys and an object "dpt" with the fields above. '
        f"Fields of \"{home}\" may be written without the section's name. DeepSpeed's keys are set the same way, e.g. "
        f"--train_batch_size 64, --zero_optimization.stage 2; known: {', '.join(sorted(DEEPSPEED_KEYS))}."
    )
    parser.print_help()
