"""Users' own tasks, readers and protocols, available to every command: Python files named in the environment."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

from dpt.errors import UserError

VARIABLE = "DPT_PLUGINS"


def load_plugins() -> None:
    """Run the Python files (or import the modules) that `DPT_PLUGINS` names, separated by colons, each once per process.

    What they register (`dpt.tasks.register_task`, `dpt.evaluation.protocols.register_protocol`,
    `data_tools.readers.register_reader`) is then available to the command. UserError if one is missing or fails.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(name)
        module = path.stem if path.suffix == ".py" else name
        if module in sys.modules:
            continue
        try:
            if path.suffix != ".py":
                importlib.import_module(module)
                continue
            spec = importlib.util.spec_from_file_location(module, path)
            assert spec is not None
            assert spec.loader is not None
            loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        except UserError:
            sys.modules.pop(module, None)
            raise
        except Exception as error:  # a user's code fails as it likes
            sys.modules.pop(module, None)
            raise UserError(f"{VARIABLE}: {name} cannot be loaded ({type(error).__name__}: {error}); correct it.") from error
