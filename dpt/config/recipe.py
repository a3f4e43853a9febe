"""A recipe: one JSON file of DeepSpeed's own keys plus one object "dpt"; read, overridden by dotted names, typed."""

import contextlib
import dataclasses
import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dpt.config.deepspeed_keys import DEEPSPEED_KEYS, check_keys
from dpt.config.generation import GenerationConfig
from dpt.config.json_text import parse_object
from dpt.config.numbers import FINITE
from dpt.config.presets import preset_values
from dpt.config.sections import (
    CONDITIONS,
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    ModelConfig,
    PixelLossConfig,
    SamplingConfig,
    TrackingConfig,
    TrainingConfig,
    UpcyclingConfig,
    ValidationConfig,
)
from dpt.errors import UserError, hide_passwords, naming

COMMAND_LINE = "the command line"


@dataclass(frozen=True, kw_only=True)
class DptConfig:
    """The "dpt" object of a recipe."""

    task: str = "class"
    """Task: class (class-conditional images), depth, flow, amodal, generalist (all three), or one of your own."""
    hardware: str = ""
    """Hardware that the recipe is meant for, in words."""
    attention_backend: Literal["auto", "sdpa", "triton", "flash2", "flash3", "flash4"] = "auto"
    """Attention kernel on GPUs; naming one that is missing is an error. Weights do not depend on it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    pixel_loss: PixelLossConfig = field(default_factory=PixelLossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    upcycling: UpcyclingConfig = field(default_factory=UpcyclingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.task not in CONDITIONS:
            raise UserError(
                f'dpt.task is "{self.task}"; choose one of {", ".join(CONDITIONS)}, or name the file that registers it in '
                "DPT_PLUGINS."
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A resolved recipe: DeepSpeed's keys as given, and the typed "dpt" object."""

    deepspeed: dict[str, Any]
    dpt: DptConfig
    path: str = ""
    overridden: frozenset[str] = frozenset()
    """Dotted names, without "dpt.", of the fields set on the command line."""

    def source_of(self, sentence: str) -> str:
        """The source that a sentence blames: the command line if it names a field set there, else the file."""
        return _blamed(sentence, self.path, self.overridden)

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Add to a UserError about one of the recipe's fields where that was set: the file or the command line."""
        try:
            yield
        except UserError as error:
            first = str(error).split(".", 1)[0]
            if first != "dpt" and first not in DEEPSPEED_KEYS:
                raise
            raise UserError(f"{self.source_of(str(error))}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The recipe as one JSON object, every field resolved; a password in the tracking address is hidden."""
        content = dataclasses.asdict(self.dpt)
        content["tracking"]["uri"] = hide_passwords(self.dpt.tracking.uri)
        return {**self.deepspeed, "dpt": content}

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 3."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def precision(self) -> str:
        """The compute dtype: "bf16", "fp16" or "fp32"."""
        for name in ("bf16", "fp16"):
            if self.deepspeed.get(name, {}).get("enabled", False):
                return name
        return "fp32"


def read_json(path: str | Path) -> dict[str, Any]:
    """Read the JSON object in `path`; UserError if it is missing, broken, or not an object."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the file cannot be read ({error}); check the path.") from error
    return parse_object(text, str(path), "a recipe")


def load_recipe(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and set fields over it.

    `overrides` maps dotted names to values: "training.steps" (a field of "dpt"; the prefix "dpt." is optional) or
    "zero_optimization.stage" (a key of DeepSpeed's). Later layers win: preset, file, overrides.
    Raises UserError that names file and field, or the command line where a field is set there.
    """
    overrides = dict(overrides or {})
    names = frozenset(name.removeprefix("dpt.") for name in overrides)
    source = str(path or COMMAND_LINE)
    try:
        return dataclasses.replace(_load(path, overrides, source), overridden=names)
    except UserError as error:
        sentence = str(error).removeprefix(f"{source}: ")
        if path is None or sentence == str(error):
            raise
        raise UserError(f"{_blamed(sentence, source, names)}: {sentence}") from error


def _blamed(sentence: str, source: str, overridden: Collection[str]) -> str:
    """The command line if the sentence names a field set there; else the source, or the command line without one."""
    said = (re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]*\w)", sentence.replace("dpt.", "")) for name in overridden)
    return COMMAND_LINE if not source or any(said) else source


def _load(path: str | Path | None, overrides: Mapping[str, Any], source: str) -> Recipe:
    content = read_json(path) if path is not None else {}
    given = content.pop("dpt", {})
    if not isinstance(given, dict):
        raise UserError(f'{source}: "dpt" is a {type(given).__name__}; it must be an object of sections.')
    _reject_unknown(content, DEEPSPEED_KEYS | {"dpt"}, source, "")
    _check_keys(given, DptConfig, source, "dpt")
    for name, value in overrides.items():
        parts = name.removeprefix("dpt.").split(".")
        target = content if parts[0] in DEEPSPEED_KEYS else given
        if target is given:
            value = _from_text(value, _field_type(parts, COMMAND_LINE), name)
        elif isinstance(value, str):
            value = _json_or_text(value)
        for part in parts[:-1]:
            inner = target.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UserError(f"{COMMAND_LINE}: {name} cannot be set, since {part} in {source} is no object.")
            target = inner
        target[parts[-1]] = value
    check_keys(content, source)
    model = given.get("model", {})
    given["model"] = {**preset_values(model.get("preset", ModelConfig.preset)), **model}
    return Recipe(deepspeed=content, dpt=_build(DptConfig, given, source, "dpt"), path=str(path or ""))


def section_from_dict(cls: type, values: Mapping[str, Any], source: str, *, prefix: str = "") -> Any:
    """Build a section (e.g. ModelConfig) from a dict, such as one in an exported config.json.

    Raises UserError on unknown or ill-typed fields, named after `prefix` (default: the class).
    """
    prefix = prefix or cls.__name__
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: {prefix} is {values!r}; it must be an object of fields.")
    _check_keys(values, cls, source, prefix)
    return _build(cls, dict(values), source, prefix)


def _build(cls: type, values: dict[str, Any], source: str, prefix: str) -> Any:
    """Build `cls(**values)` with types checked by jsonargparse, nested sections included."""
    from jsonargparse import ArgumentError

    hints = get_type_hints(cls)
    nested = {n: _build(h, values.pop(n), source, f"{prefix}.{n}") for n, h in hints.items() if _is_section(h) and n in values}
    for name, value in values.items():
        wrong = UserError(f"{source}: {prefix}.{name} is {value!r}; it must be {type_in_words(hints[name])}.")
        if value is None and type(None) not in get_args(hints[name]):  # jsonargparse lets this pass
            raise wrong
        try:
            values[name] = _parser(hints[name]).parse_object({"value": value}, defaults=False)["value"]
        except ArgumentError as error:
            raise wrong from error
        _check_finite(f"{source}: {prefix}.{name}", values[name])
    with naming(source):
        return cls(**nested, **values)


@cache
def _parser(hint: Any) -> Any:
    """The parser of a "value" of this type, made once, as that takes longer than parsing."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument("--value", type=hint)
    return parser


def _check_finite(name: str, value: Any) -> None:
    """Refuse NaN and infinity, which Python's JSON parser reads but no field takes."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, float):
            FINITE.check(name, one)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def type_in_words(hint: Any) -> str:
    """A field's type in plain words: "a whole number", "one of linear, log", "a list, each a text"."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is list:
        return f"a list, each {type_in_words(get_args(hint)[0])}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(type_in_words, get_args(hint)))
    if hint is dict or get_origin(hint) is dict:
        return "an object"
    return _KINDS.get(hint, f"of type {getattr(hint, '__name__', hint)}")


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _check_keys(values: Mapping[str, Any], cls: type, source: str, prefix: str) -> None:
    hints = get_type_hints(cls)
    _reject_unknown(values, hints.keys(), source, prefix + ".")
    for name, value in values.items():
        if _is_section(hints[name]):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {prefix}.{name} is {value!r}; it must be an object of fields.")
            _check_keys(value, hints[name], source, f"{prefix}.{name}")


def _reject_unknown(values: Mapping[str, Any], known: Any, source: str, prefix: str) -> None:
    for name in values:
        if name not in known:
            raise UserError(f'{source}: there is no field "{prefix}{name}"{_suggestion(name, list(known))}')


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean "{close[0]}"?' if close else f"; known here: {', '.join(sorted(known))}."


def _field_type(parts: list[str], source: str) -> Any:
    cls: Any = DptConfig
    for depth, part in enumerate(parts):
        hints = get_type_hints(cls) if _is_section(cls) else {}
        if part not in hints:
            known = sorted(hints) + (sorted(DEEPSPEED_KEYS) if depth == 0 else [])
            raise UserError(f'{source}: there is no field "{".".join(parts)}"{_suggestion(part, known)}')
        cls = hints[part]
    return cls


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _from_text(value: Any, hint: Any, name: str) -> Any:
    """Convert a command-line text to the field's type: lists may be written "1,5,50"; non-text is kept."""
    if not isinstance(value, str) or hint is str:
        return value
    if _is_section(hint):
        parsed = _json_or_text(value)
        if not isinstance(parsed, dict):
            raise UserError(f"--{name} is a section; set one of its fields, e.g. --{name}.{dataclasses.fields(hint)[0].name}.")
        return parsed
    if get_origin(hint) is list and not value.lstrip().startswith("["):
        (element,) = hint.__args__
        return [v if element is str else _json_or_text(v) for v in value.split(",") if v]
    return _json_or_text(value)
