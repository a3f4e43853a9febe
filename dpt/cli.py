"""The command `dpt`: looks up one of its sub-commands and loads nothing else."""

import difflib
import importlib
import keyword
import os
import sys
from collections.abc import Sequence

from dpt.config.parser import Parser

COMMANDS = {
    "predict": "predict depth, optical flow or whole objects for pictures and videos",
    "sample": "sample class-conditional images",
    "fid": "score class-conditional weights: FID, sFID, Inception Score, precision, recall, FD-DINOv2",
    "report": "write an HTML report about an experiment",
    "compare": "compare runs side by side",
    "laws": "fit power laws to runs and plot them",
    "plan": "split a budget between model size, training stages and test time",
    "study": "run a grid of launches and draw its figures",
    "presets": "list model sizes: parameters, MACs, bytes per rank",
    "cluster": "model training on many GPUs: layouts, times, memory, recipes",
    "routing": "show which experts get which tokens",
    "experts": "plot how experts diverge in training",
    "export": "export weights as our folder or as a diffusers pipeline",
    "import": "import public weights as our folder",
    "push": "push weights with a model card to the Hugging Face Hub",
    "sync": "send records that an outage of the MLflow server left behind",
}
"""Every command is a module in `dpt.commands` with `configure(parser)` and `run(arguments)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends in one sentence and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("--local_rank="):  # from the DeepSpeed launcher, which sets LOCAL_RANK too
        del arguments[0]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name == "--version":
        from dpt import __version__

        print(f"dpt {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f'did you mean "{close[0]}"?' if close else "`dpt --help` lists the commands."
        print(f'dpt: error: there is no command "{name}"; {hint}', file=sys.stderr)
        return 2
    return run(name, rest)


def run(name: str, rest: Sequence[str]) -> int:
    """Parse a command's own arguments and run it."""
    from dpt.cpu.settings import limit_spinning
    from dpt.errors import reported
    from dpt.plugins import load_plugins

    limit_spinning()
    module = importlib.import_module(module_name(name))
    parser = Parser(prog=f"dpt {name}", description=module.__doc__)
    module.configure(parser)
    arguments = parser.parse_args(rest)
    try:
        with reported(f"dpt {name}"):
            load_plugins()
            module.run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # `dpt presets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


def module_name(name: str) -> str:
    """The module of a command ("import" is a Python keyword, so its module is `import_`)."""
    return f"dpt.commands.{name}{'_' if keyword.iskeyword(name) else ''}"


def usage() -> str:
    """The text of `dpt --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: dpt COMMAND ...", "", "commands:", *lines, "", "`dpt COMMAND --help` explains one."])


if __name__ == "__main__":
    sys.exit(main())
