"""Opening pickles of plain data without running what they ask for.

Implemented here because torch's loader that refuses code only reads files of torch.save.
"""

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np


def load_plain_pickle(path: Path) -> Any:
    """Load a pickle of numbers, text, bytes, lists, tuples, sets, dicts and numpy arrays.

    Raises:
        pickle.UnpicklingError: it names anything else, none of which has been called by then.
    """
    return _PlainUnpickler(io.BytesIO(path.read_bytes())).load()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), name))
        if allowed is None:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is no plain data; it was not loaded")
        return allowed


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes as old protocols write them: _codecs.encode(text, "latin1")."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the pickle asks for the codec {encoding!r}; it was not loaded")
    return text.encode("latin1")


def _array(subtype: type, shape: tuple[int, ...], typecode: bytes) -> np.ndarray[Any, Any]:
    """Equivalent of numpy's own reconstruction: an empty array, filled by the pickle's state."""
    if subtype is not np.ndarray:
        raise pickle.UnpicklingError(f"the pickle asks for an array of type {subtype!r}; it was not loaded")
    return np.ndarray(shape, np.dtype(typecode.decode("ascii")))


def _scalar(dtype: np.dtype[Any], content: bytes) -> Any:
    if dtype.hasobject:
        raise pickle.UnpicklingError("the pickle asks for a numpy scalar that holds an object; it was not loaded")
    return np.frombuffer(content, dtype)[0]


def _from_buffer(buffer: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray[Any, Any]:
    """Arrays as protocol 5 writes them."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _latin1,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "complex"): complex,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "set"): set,
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
}
