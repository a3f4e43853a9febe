"""Calls for which a GPU's work must be waited for, found on a CPU and counted by the place in the code that makes them."""

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpt.models import grouped_mlp

aten = torch.ops.aten

WAITING = {  # operators whose result a host must know, or whose shape depends on numbers
    aten._local_scalar_dense,
    aten.item,
    aten.is_nonzero,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.argwhere,
    aten.masked_select,
    aten.unique_dim,
    aten._unique,
    aten._unique2,
    aten.unique_consecutive,
    aten.bincount,
    aten.equal,
    aten.allclose,
    aten.histc,
}
COPYING = {  # methods that bring numbers to the host without an operator, where the tensor is there already
    Tensor.tolist: "tolist",
    Tensor.numpy: "numpy",
    Tensor.cpu: "cpu",
    Tensor.__array__: "__array__",
}
_OURS = Path(__file__).resolve().parents[2] / "dpt"


class HostWaits:
    """Within it, host waits are counted in `found` by ("file.py:function", what), those of DeepSpeed too; `operators` are the
    names of all operators that ran."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self.operators: set[str] = set()
        self._modes = (_Operators(self._note, self.operators), _Methods(self._note))

    def __enter__(self) -> "HostWaits":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def _note(self, what: str) -> None:
        self.found[_place(), what] += 1


def _place() -> str:
    """The innermost function of ours on the stack, or of DeepSpeed's if that is nearer."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(_OURS):
            return f"{path.relative_to(_OURS)}:{frame.name}"
        if "deepspeed" in path.parts:
            return f"deepspeed/{path.name}:{frame.name}"
    return "elsewhere"


class _Operators(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None], seen: set[str]) -> None:
        super().__init__()
        self.note, self.seen = note, seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        self.seen.add(packet.__name__)
        if packet in WAITING:
            self.note(packet.__name__)
        elif packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and _has_mask(args[1]):
            self.note(f"{packet.__name__} by a mask")
        elif packet is aten.repeat_interleave and (kwargs or {}).get("output_size") is None:
            self.note("repeat_interleave of unknown length")
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class _Methods(TorchFunctionMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COPYING:
            self.note(COPYING[func])
        elif func is Tensor.to and _names_the_cpu([*args[1:], *kwargs.values()]):
            self.note("to the CPU")
        return func(*args, **kwargs)


def use_grouped_products() -> None:
    """From now on this process takes a GPU's grouped products for its experts."""
    grouped_mlp.has_grouped_products = lambda _: True


def _names_the_cpu(arguments: list[Any]) -> bool:
    return any(a == "cpu" if isinstance(a, str) else isinstance(a, torch.device) and a.type == "cpu" for a in arguments)
