"""Prints the tests of what was changed since a commit (default: origin/main, or the last commit): `make check`.

Those are the house rules, the test files that were changed, and for every other changed file the tests nearest to it: those
that import it, or else those that import what imports it, and so on; in the folder that mirrors its room, if any are there.
Commands, launchers, pages and recipes, which nothing imports, are covered by the tests that name them.
"""

import ast
import functools
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ["tests/test_house.py"]
FOLDERS = ("dpt", "data_tools", "launchers", "benchmarks", "examples", "tests")
HOMES = {"cpu": "tests/models/", "commands": "tests/test_"}
"""Where the tests of a room are, if not in the folder of its name."""

_FEW = 3
"""Of tests that import a module by way of others, enough."""


def changed_since(base: str) -> list[str]:
    """Paths of the files that differ from a commit, new ones included."""
    committed = _git("diff", "--name-only", "--diff-filter=d", base)
    return [*committed, *_git("ls-files", "--others", "--exclude-standard")]


def chosen_for(changed: list[str]) -> list[str]:
    """The test files to run for changed files, relative to the root."""
    return sorted({*ALWAYS, *(test for path in changed for test in _tests_of(path))})


def _tests_of(path: str) -> set[str]:
    folder, name = path.rpartition("/")[::2]
    if _is_test(path):
        return {path}
    if name == "conftest.py":
        return {test for test in _files() if _is_test(test) and test.startswith(f"{folder}/")}
    if not name.endswith(".py") or folder == "launchers":
        return _naming(name, folder)
    parts = path.removesuffix(".py").split("/")
    room = parts[1] if parts[0] == "dpt" else parts[0]
    found = _naming(path, name)
    if room == "commands":
        found |= {test for test in _naming(parts[-1].rstrip("_")) if "dpt.cli" in imports_of(ROOT / test)}
    if room == "benchmarks":  # tests elsewhere borrow from them
        found |= {test for test in _importers()[path] if _is_test(test)}
    found |= _nearest(path, HOMES.get(room, (f"tests/{room}/", f"tests/test_{room}"))) or _nearest(path, "tests/")
    return found or {test for test in _files() if _is_test(test) and test.startswith(f"tests/{room}/")}


def _nearest(path: str, home: str | tuple[str, ...]) -> set[str]:
    """The tests in `home` that import a module, or else those that import the modules that import it, and so on until there
    are a few."""
    tests, seen, level = set[str](), set[str](), {path}
    while level and len(tests) < _FEW:
        importing = {file for imported in level for file in _importers()[imported]}
        tests |= {file for file in importing if _is_test(file) and file.startswith(home)}
        if tests and level == {path}:
            break
        seen |= level
        level = {file for file in importing if not _is_test(file)} - seen
    return tests


def _naming(*names: str) -> set[str]:
    """The tests in which one of these names is a string."""
    wanted = {name for name in names if name}
    return {test for test in _files() if _is_test(test) and wanted & _strings(test)}


@functools.cache
def _files() -> list[str]:
    return [str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


@functools.cache
def _importers() -> dict[str, set[str]]:
    """File -> the files that import it. Tests find the modules beside them without their packages' names."""
    paths = {}
    for file in _files():
        paths[file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = file
        if file.startswith("tests/"):
            paths[Path(file).stem] = file
    importers = defaultdict(set)
    for file in _files():
        for name in imports_of(ROOT / file) & paths.keys():
            importers[paths[name]].add(file)
        if file.startswith("dpt/commands/"):
            importers[file].add("dpt/cli.py")  # imports them by their names
    return importers


@functools.cache
def _strings(file: str) -> set[str]:
    return {node.value for node in _nodes(ROOT / file) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _is_test(path: str) -> bool:
    return path.startswith("tests/") and Path(path).name.startswith("test_")


@functools.cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, and the names that it imports from them as `MODULE.NAME`."""
    names = set()
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def _base() -> str:
    found = subprocess.run(["git", "merge-base", "HEAD", "origin/main"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "HEAD"


if __name__ == "__main__":
    print("\n".join(chosen_for(changed_since(sys.argv[1] if len(sys.argv) > 1 else _base()))))
