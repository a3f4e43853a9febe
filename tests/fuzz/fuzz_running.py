"""Commands in forked processes of a warm interpreter: what they leave behind ends with them, and a hang can be ended."""

import atexit
import contextlib
import gc
import importlib
import os
import runpy
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from dpt import cli
from tests.gloo import load_libraries

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 240.0
"""Wall-clock time after which a command counts as hanging: machines may be busy."""
_MODULES = {
    "encode": "data_tools.encode",
    "inspect": "data_tools.inspect",
    "synthesis": "data_tools.synthesis.__main__",
    "native": "data_tools.native.__main__",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended."""

    code: int | None
    """None: it hung and was killed."""
    stdout: str
    stderr: str

    @property
    def fault(self) -> str:
        """What is wrong with it, if anything: a stack trace, a hang, a wrong exit code, or an error without a word."""
        if self.code is None:
            return "it hangs"
        if "Traceback (most recent call last)" in self.stderr + self.stdout:
            return "stack trace"
        if self.code not in (0, 2):
            return f"exit code {self.code}"
        if self.code == 2 and not self.stderr.strip():
            return "exit code 2 without a word"
        return ""


def warm_up() -> None:
    """Load what commands need, once."""
    load_libraries()
    for name in ("mlflow", "pandas", "scipy.optimize", "yaml", *_MODULES.values(), *map(cli.module_name, cli.COMMANDS)):
        importlib.import_module(name)
    gc.freeze()


def run_command(line: list[str], folder: Path) -> Outcome:
    """Run a command line, its program first, in `folder`."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        _child(line, folder)
    end = time.monotonic() + HANG_S
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found or time.monotonic() > end:
            break
        time.sleep(0.01)
    hung = not found
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # it, and what it has started
    if hung:
        os.waitpid(child, 0)
    texts = [(folder / name).read_text(errors="replace") for name in (".stdout", ".stderr")]
    return Outcome(code=None if hung else os.waitstatus_to_exitcode(status), stdout=texts[0], stderr=texts[1])


def _child(line: list[str], folder: Path) -> None:
    code: object = 1
    try:
        atexit._clear()  # what belongs to the parent
        os.setsid()
        os.chdir(folder)
        for number, name in ((1, ".stdout"), (2, ".stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
        torch.set_num_threads(1)
        try:
            code = _run(line)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _run(line: list[str]) -> object:
    program, arguments = line[0], line[1:]
    sys.argv = [program, *arguments]
    if program == "dpt":
        return cli.main(arguments)
    if program in _MODULES:
        return importlib.import_module(_MODULES[program]).main(arguments)
    runpy.run_path(str(ROOT / "launchers" / f"{program}.py"), run_name="__main__")
    return 0
