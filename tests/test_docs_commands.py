"""Every command of the README and the docs is one that there is: bash unfolds each block, and what it would start is tried.

Those that need nothing but this repository are run as they are. The others want data, weights, GPUs or servers: of these the
command line is parsed, as far as their own parsers and checks go without touching anything.
"""

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dpt import cli
from dpt.config.checks import check_recipe
from dpt.config.command import parse_command
from dpt.config.parser import Parser

ROOT = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash") or "bash"
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.stem != "own_task")]
"""The page on own tasks is run as a whole (test_examples.py)."""
OURS = ("dpt", "python", "deepspeed", "torchrun", "make", "encode")
FOREIGN = ("cp", "mkdocs", "mlflow", "ninja", "pip", "sbatch", "srun", "ssh", "ulimit")
"""What is not ours to try; files that they name must be there."""
HOMES = {"pretrain": "training", "finetune": "training", "upcycle": "training", "evaluate": "evaluation"}
AS_THEY_ARE = ("presets", "cluster")
"""Commands of dpt that are run."""

PREAMBLE = """
set -f +H
log() { printf '%s\\0' "$@"; printf '\\1\\0'; }
""" + "".join(f'{name}() {{ log {name} "$@"; }}\n' for name in (*OURS, *FOREIGN))


def blocks(page: Path) -> list[str]:
    """Indented and fenced blocks in which some line starts one of our commands."""
    found, fence, block = [], "", ""
    for line in [*page.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("```"):
            if fence:
                found += [block] if fence in ("```", "```bash", "```sh") else []
                fence, block = "", ""
            else:
                fence, block = line.strip(), ""
        elif fence:
            block += line + "\n"
        elif line.startswith("    "):
            block += line[4:] + "\n"
        elif block:
            found.append(block)
            block = ""
    start = re.compile(rf"^\s*(?:{'|'.join(OURS)}) [-\w./]+", re.MULTILINE)
    return [
        block for block in found if start.search(block) and not re.search(r"^(?:from|import|def|class) ", block, re.MULTILINE)
    ]


def unfolded(block: str) -> list[list[str]]:
    """The command lines that bash makes of a block; nothing is started."""
    block = re.sub(r"\[--[^]]*\]|<[^>]*>", "", block)  # what may be left out
    done = subprocess.run([BASH, "-c", PREAMBLE + block], capture_output=True, text=True, cwd=ROOT, env={"PATH": ""})
    assert not done.stderr, f"{done.stderr}\n{block}"
    lines = [line.split("\0") for line in done.stdout.split("\1\0") if line]
    return [_without_dots([word for word in line if word]) for line in lines]


def _without_dots(line: list[str]) -> list[str]:
    """Without "...", which stands for more words, or for an option's value."""
    pairs = zip(line, [*line[1:], ""], strict=True)
    return [word for word, after in pairs if word != "..." and (after != "..." or word[0] != "-")]


COMMANDS = sorted({(page.name, *line) for page in PAGES for block in blocks(page) for line in unfolded(block)})


def test_commands_are_found() -> None:
    programs = {line[1] for line in COMMANDS}
    assert {"dpt", "python", "deepspeed", "torchrun", "make"} <= programs
    assert len(COMMANDS) > 100
    assert {page.name for page in PAGES} >= {"README.md", "training.md", "predicting.md", "reproduce.md"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda line: f"{line[0]}: {shlex.join(line[1:])[:90]}")
def test_a_command_is_one_that_there_is(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    program, arguments = command[1], list(command[2:])
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program == "dpt":
        _try_dpt(arguments)
    elif program == "encode":
        _try_module("data_tools.encode", ["--resolution", "128", *arguments])
    elif program in FOREIGN:
        named = [word for word in arguments if word.startswith(("launchers/", "ds_configs/", "constraints"))]
        assert all((ROOT / word).exists() or word == "launchers/hostfile" for word in named)
    else:
        _try_script(_without_launcher(program, arguments))


def _without_launcher(program: str, arguments: list[str]) -> list[str]:
    """What a launcher's or an interpreter's command line starts: ["-m", MODULE, ...] or [SCRIPT, ...]."""
    for number, word in enumerate(arguments):
        if word in ("-m", "--module"):
            return ["-m", *arguments[number + 1 :]]
        if word.endswith(".py"):
            return arguments[number:]
    raise AssertionError(f"{program} {shlex.join(arguments)}: it starts nothing")


def _try_script(words: list[str]) -> None:
    if words[0] == "-m":
        if words[1] == "dpt.cli":
            return _try_dpt(words[2:])
        return _try_module(words[1], words[2:])
    path = ROOT / words[0]
    assert path.is_file()
    if path.stem in HOMES and path.parent.name == "launchers":
        recipe = parse_command(path.stem, "", HOMES[path.stem], words[1:])
        if path.stem != "evaluate" and recipe.path:
            check_recipe(recipe, recipe.dpt.training.ep_size, path.stem)
    return None


def _try_dpt(arguments: list[str]) -> None:
    name, rest = arguments[0], arguments[1:]
    assert name in cli.COMMANDS
    if name in AS_THEY_ARE or (name == "study" and "--dry-run" in rest and not any("*" in word for word in rest)):
        assert cli.main(arguments) == 0
        return
    module = importlib.import_module(cli.module_name(name))
    parser = Parser(f"dpt {name}", "")
    module.configure(parser)
    parser.parse_args(rest)  # leaves with exit code 2 if it does not go


def _try_module(name: str, arguments: list[str]) -> None:
    if name.startswith("benchmarks"):
        assert importlib.util.find_spec(name) is not None
        return
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    module = importlib.import_module(f"{name}.__main__" if spec.submodule_search_locations else name)
    module.parser().parse_args(arguments)
