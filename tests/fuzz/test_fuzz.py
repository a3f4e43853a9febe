"""Command lines and recipes that are a little wrong end with exit code 0 or 2: no stack trace, no hang, never without a word.

A share of each runs in `make test`, 2,000 and 1,000 in `make test-all`. DPT_FUZZ_SEED chooses others.
"""

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_assets import make_assets
from fuzz_cases import COMMANDS, command_lines, recipes
from fuzz_running import run_command, warm_up

SEED = int(os.environ.get("DPT_FUZZ_SEED", "0"))


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "assets"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        make_assets(folder)
        warm_up()
    return folder


@pytest.fixture
def run(assets: Path, tmp_path: Path) -> Callable[[list[str], str | None], str]:
    """Runs a command in a fresh copy of the assets; gives the fault with the command and its last words, or nothing."""

    def once(line: list[str], recipe: str | None = None) -> str:
        folder = shutil.copytree(assets, tmp_path / "work")
        if recipe is not None:
            (folder / "recipe.json").write_text(recipe)
        outcome = run_command(line, folder)
        shutil.rmtree(folder)
        if not outcome.fault:
            return ""
        return f"{outcome.fault}: {shlex.join(line)} {recipe or ''}\n{outcome.stderr[-1500:] or outcome.stdout[-500:]}"

    return once


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: " ".join(line[:2]))
def test_commands_as_they_are_work(line: list[str], assets: Path, tmp_path: Path) -> None:
    outcome = run_command(line, shutil.copytree(assets, tmp_path / "work"))
    enough = line[:2] not in (["dpt", "plan"], ["dpt", "experts"])  # which want more runs, and runs with experts
    assert (outcome.code, outcome.fault) == (0 if enough else 2, ""), outcome.stderr[-2000:]


def _check(run: Callable[..., str], cases: list[tuple[list[str], str | None]]) -> None:
    faults = [fault for line, recipe in cases if (fault := run(line, recipe))]
    assert not faults, f"{len(faults)} of {len(cases)}:\n" + "\n\n".join(faults[:20])


@pytest.mark.parametrize("count", [25, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_command_lines(count: int, run: Callable[..., str]) -> None:
    _check(run, [(line, None) for line in command_lines(SEED, count)])


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_recipes(count: int, run: Callable[..., str]) -> None:
    _check(run, [([launcher, "--ds_config", "recipe.json"], text) for launcher, text in recipes(SEED, count)])
