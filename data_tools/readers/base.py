"""The interface of data set readers, and the samples that they deliver."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dpt.errors import UserError

Task = Literal["class", "depth", "flow", "amodal"] | str
"""A built-in task, or the name of one that `dpt.tasks.register_task` has added."""


SYNTHESIS = "synthesis.json"
"""File that distinguishes our rendered scenes from the set whose layout they have: in the root, or beside it."""


def is_synthetic(root: Path) -> bool:
    """Whether `root` holds our rendered scenes."""
    return any((folder / SYNTHESIS).is_file() for folder in (root, root.absolute().parent))


class ReadError(Exception):
    """One sample that cannot be read: skipped, listed and counted, without ending the job."""

    def __init__(self, key: str, path: Path, reason: str) -> None:
        super().__init__(key, path, reason)
        self.key, self.path, self.reason = key, path, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.path}: {self.reason}"


class Excluded(ReadError):
    """A sound sample that the data set's own filter leaves out (nothing is wrong with its files)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as the files hold it, nothing resized, cropped or clipped.

    Raises:
        ValueError: arrays of wrong dtype or shape, or of differing sizes.
    """

    key: str
    images: tuple[NDArray[np.uint8], ...]
    """uint8 [H, W, 3] each. class: the picture; depth: rgb; flow: two frames; amodal: rgb, visible mask (0 or 255)."""
    label: int | None = None
    """Class id, for task "class"."""
    class_name: str | None = None
    depth: NDArray[np.float32] | None = None
    """float32 [H, W], metres along the camera's axis, 0 where unknown."""
    flow: NDArray[np.float32] | None = None
    """float32 [2, H, W], pixels (u right, v down) from the first frame to the second, 0 where unknown."""
    mask: NDArray[np.bool_] | None = None
    """bool [H, W], the amodal mask."""
    truth: NDArray[np.float32] | None = None
    """float32 [C, H, W], the values of a registered task."""
    valid: NDArray[np.bool_] | None = None
    """bool [H, W], where depth, flow or truth is known; None: everywhere, or no such truth."""
    whole: NDArray[np.uint8] | None = None
    """uint8 [H, W, 3], the whole object on white, where the set has one."""
    meta: dict[str, Any] = field(default_factory=dict)
    """"source": path within the set, and whatever else the set provides (JSON types)."""

    def __post_init__(self) -> None:
        size = self.images[0].shape[:2]
        if min(size) == 0:
            raise ValueError(f"an empty picture of {size[1]} x {size[0]} pixels")
        expected: list[tuple[NDArray[Any] | None, Any, tuple[int, ...]]] = [
            *((picture, np.uint8, (*size, 3)) for picture in (*self.images, self.whole)),
            (self.depth, np.float32, size), (self.flow, np.float32, (2, *size)),
            (self.truth, np.float32, (0 if self.truth is None else len(self.truth), *size)),
            (self.mask, np.bool_, size), (self.valid, np.bool_, size),
        ]  # fmt: skip
        for array, dtype, shape in expected:
            if array is not None and (array.dtype != dtype or array.shape != shape):
                raise ValueError(f"{array.dtype} {list(array.shape)} where {np.dtype(dtype)} {list(shape)} is expected")


class Reader(Protocol):
    """Locates the samples of one split of a data set when it is made, and reads them one by one, in any process."""

    name: str
    task: Task
    version: int = 1
    """Incremented whenever the same files would give different samples."""
    class_names: tuple[str, ...] = ()
    """Class names by label, for task "class"; empty otherwise, and where a set does not name its classes."""

    def keys(self) -> list[str]:
        """All samples, in an order that depends on nothing but the set."""
        ...

    def read(self, key: str) -> Sample:
        """Read one sample.

        Raises:
            ReadError: a file of it is missing, does not decode or has the wrong shape.
        """
        ...


@contextmanager
def reading(key: str, path: Path) -> Iterator[None]:
    """Turn any exception while reading `path` into a ReadError of sample `key`."""
    try:
        yield
    except ReadError:
        raise
    except FileNotFoundError as error:
        raise ReadError(key, Path(error.filename or path), "is missing") from error
    except Exception as error:  # on broken bytes decoders raise OSError, SyntaxError, struct.error, KeyError and others
        raise ReadError(key, path, f"does not read: {type(error).__name__}: {error}") from error


def check_split(name: str, split: str, known: tuple[str, ...]) -> None:
    """UserError if a set has no such split."""
    if split not in known:
        raise UserError(f"{name} has no split {split!r}; choose one of {', '.join(known)}.")


def first_existing(paths: Iterable[Path]) -> Path | None:
    """The first file or folder that exists."""
    return next((path for path in paths if path.exists()), None)


def wrong_root(name: str, root: Path, expected: str) -> UserError:
    """The error for a folder that does not hold the set."""
    state = "does not exist" if not root.exists() else "does not hold it"
    return UserError(f"{name}: {root} {state}; expected {expected} (docs/readers.md shows the layouts).")
