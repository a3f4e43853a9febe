"""Prints the tests of what was changed since a commit (default: origin/main, or the last commit): `make check`.

Those are the test files that were changed, those that import a changed module of their own room, and the house rules.
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ["tests/test_house.py"]


def changed_since(base: str) -> list[str]:
    """Paths of the files that differ from a commit, new ones included."""
    committed = _git("diff", "--name-only", "--diff-filter=d", base)
    return [*committed, *_git("ls-files", "--others", "--exclude-standard")]


def chosen_for(changed: list[str]) -> list[str]:
    """The test files to run for changed files, relative to the root."""
    chosen = set(ALWAYS)
    modules = {path.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in changed if path.endswith(".py")}
    for test in (ROOT / "tests").rglob("test_*.py"):
        path = str(test.relative_to(ROOT))
        if path in changed or any(_belongs(path, module) for module in modules & imports_of(test)):
            chosen.add(path)
    if any(path.endswith((".md", ".json", ".yaml")) for path in changed):
        chosen |= {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_docs*.py")}
    return sorted(chosen)


def _belongs(test: str, module: str) -> bool:
    """Whether a test is in the folder that mirrors the module's room; a room of one file has its tests in tests/ itself."""
    parts = module.split(".")[1 if module.startswith("dpt.") else 0 :]
    return test.startswith((f"tests/{parts[0]}/", f"tests/test_{parts[0]}"))


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, and the names that it imports from them as `MODULE.NAME`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
