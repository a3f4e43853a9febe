"""Peak memory: what tensors hold at once."""

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpt.cpu.settings import return_freed_memory


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made under this mode that are alive (`now`), and their maximum at any time (`peak`).

    existing: tensors made before, whose views do not count either.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._live:
                storage = tensor.untyped_storage()
                self._live.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def peak_bytes(build: Callable[[], Callable[[], object]]) -> float:
    """Peak bytes held by tensors in the second call of what `build` makes, including all that it made before.

    Counted at the tensors on a CPU, by the allocator on a GPU. The first call does not count: optimizers create states then.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        action = build()
        action()
        torch.cuda.reset_peak_memory_stats()
        action()
        return float(torch.cuda.max_memory_allocated() - before)
    with LiveBytes() as live:
        action = build()
        action()
        live.peak = live.now
        action()
    del action
    gc.collect()
    return_freed_memory()
    return float(live.peak)
