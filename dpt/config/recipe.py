"""A recipe: one JSON file of DeepSpeed's own keys plus one object "dpt"; read, overridden by dotted names, validated."""

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from dpt.config.presets import preset_values
from dpt.config.sections import (
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    ModelConfig,
    SamplingConfig,
    Task,
    TrackingConfig,
    TrainingConfig,
    UpcyclingConfig,
)
from dpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DptConfig:
    """The "dpt" object of a recipe."""

    task: Task = "class"
    """What is learned: class-conditional images, one perception task, or all of them (generalist)."""
    hardware: str = ""
    """The hardware that the recipe is meant for, in words."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    upcycling: UpcyclingConfig = field(default_factory=UpcyclingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A resolved recipe: DeepSpeed's keys as given, and the typed "dpt" object."""

    deepspeed: dict[str, Any]
    dpt: DptConfig
    path: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The recipe as one JSON object, every field resolved."""
        return {**self.deepspeed, "dpt": dataclasses.asdict(self.dpt)}


class _Parser(ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        raise UserError(message) from ex


def build_parser(prog: str, description: str) -> ArgumentParser:
    """The parser of the "dpt" object: fields as `--training.steps N`; its help lists each with default and meaning."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=prog, description=description, exit_on_error=True)
    parser.add_class_arguments(DptConfig, None)
    return parser


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in `path`; UserError if it is missing, broken, or no object."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read ({error.strerror}); check the path.") from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a recipe is a JSON object, not a {type(value).__name__}.")
    return value
