"""What may meet CUDA, and when: page-locked memory in the training process alone, and no question before the device is set."""

import ast
import os
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shrinking import ROOT

from tests.gloo import load_libraries

PINNING = {"dpt/data", "data_tools/encoding/pipeline.py"}
"""Where page-locked memory is allocated: the loader of the training's process, and the process that encodes."""
FORKING = ("multiprocessing", "torch.multiprocessing", "torch.utils.data", "subprocess", "concurrent.futures.process")


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _pins(path: Path) -> bool:
    """Whether the file allocates page-locked memory (rather than handing on that somebody shall)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if node.func.attr == "pin_memory" or (of_torch and any(k.arg == "pin_memory" for k in node.keywords)):
                return True
    return False


def test_page_locked_memory_is_allocated_by_loaders_alone() -> None:
    found = {str(path.relative_to(ROOT)) for path in _sources("dpt", "data_tools", "launchers") if _pins(path)}
    assert {name for name in found if not name.startswith(tuple(PINNING))} == set()
    assert found


def test_the_loader_has_no_processes() -> None:
    """A process that is forked cannot use CUDA, page-locked memory included."""
    forking = {}
    for path in _sources("dpt/data"):
        tree = ast.parse(path.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute) and node.attr in ("fork", "DataLoader", "ProcessPoolExecutor"):
                names.add(f"multiprocessing by {node.attr}")
        if found := {name for name in names if name.startswith(FORKING) or "DataLoader" in name or "ProcessPool" in name}:
            forking[path.name] = found
    assert not forking


class _DeviceSet(BaseException):
    """The launcher has set its device: what comes after is no matter of these tests."""


@pytest.mark.parametrize(("launcher", "recipe"), [("pretrain", "cpu_ep2"), ("finetune", "quickstart_depth")])
def test_no_question_to_cuda_before_the_device_is_set(
    launcher: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other would open a context of every rank on GPU 0. On rank 3 of a machine that seems to have GPUs."""
    load_libraries()
    calls: list[str] = []
    for name, value in vars(torch.cuda).items():
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType) and not name.startswith("_"):
            monkeypatch.setattr(torch.cuda, name, _recorded(name, calls))
    for name, value in {
        "RANK": "3",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setitem(os.environ, name, value)
    arguments = ["--ds_config", str(ROOT / "ds_configs" / f"{recipe}.json"), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [launcher, *arguments])
    with pytest.raises(_DeviceSet, match=r"^3$"):
        runpy.run_path(str(ROOT / "launchers" / f"{launcher}.py"), run_name="__main__")
    assert set(calls) <= {"is_available"}


def _recorded(name: str, calls: list[str]) -> Callable[..., Any]:
    answers: dict[str, Any] = {"is_available": True, "device_count": 4, "mem_get_info": (80 << 30, 80 << 30)}

    def call(*arguments: Any, **_: Any) -> Any:
        calls.append(name)
        if name == "set_device":
            calls.pop()
            raise _DeviceSet(*arguments)
        return answers.get(name)

    return call
