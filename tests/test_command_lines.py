"""The launchers as a user meets them: help that lists every field, and bad input that ends in one sentence and exit code 2."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from dpt.config.recipe import DptConfig

LAUNCHERS = Path(__file__).resolve().parents[1] / "launchers"
STAGES = ("pretrain", "finetune", "upcycle", "evaluate")
TINY = {
    "train_batch_size": 2,
    "zero_optimization": {"stage": 1},
    "dpt": {"model": {"hidden_size": 32, "depth": 1, "num_heads": 2, "input_size": 8, "num_classes": 2}},
}


def run(monkeypatch: pytest.MonkeyPatch, launcher: str, *arguments: str) -> int | str | None:
    """The launcher's exit code, run in this process up to where it would start distributed work."""
    monkeypatch.setattr(sys, "argv", [f"{launcher}.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(LAUNCHERS / f"{launcher}.py"), run_name="__main__")
    return stop.value.code


def field_names(config: type = DptConfig, prefix: str = "") -> list[str]:
    """Of all sections, those within sections too."""
    names = []
    for name, hint in get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            names += field_names(hint, f"{prefix}{name}.")
        elif prefix:
            names.append(prefix + name)
    return names


@pytest.mark.parametrize("launcher", STAGES)
def test_help_lists_every_field_with_default_and_meaning(
    launcher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert run(monkeypatch, launcher, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for name in field_names():
        start = next((i for i, line in enumerate(lines) if line.strip().startswith(f"--{name} ")), None)
        assert start is not None, name
        entry = " ".join(lines[start : start + 2]).split(maxsplit=2)[-1]
        assert "default:" in entry, name
        assert len(entry) > len("(default: )") + 10, name


@pytest.mark.parametrize("launcher", STAGES)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["recipe.json"]),
        ("{", ["recipe.json", "JSON"]),
        ({"dpt": {"training": {"setps": 3}}}, ["setps", "did you mean", "steps"]),
    ],
)
def test_bad_recipes(
    launcher: str,
    content: object,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "recipe.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert run(monkeypatch, launcher, "--ds_config", str(path)) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    for word in words:
        assert word in message


def test_evaluate_needs_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "evaluate", "--data", "nowhere") == 2
    assert "dpt.evaluation.weights" in capsys.readouterr().err
