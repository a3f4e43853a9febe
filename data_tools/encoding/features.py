"""Features of samples that hidden states are aligned with: exact ones of synthetic scenes, or ready-made ones in a folder."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_tools.encoding.samples import Features, Frame, Layout
from data_tools.readers import Reader, ReadError
from data_tools.synthesis.geometry import SEGMENTS, SceneGeometry
from dpt.errors import UserError

Kind = Literal["normals", "segments"]


class SceneFeatures:
    """Normals in the camera's axes (3 channels), or the share of each kind of surface (13), averaged over each latent."""

    def __init__(self, kind: Kind, geometry: SceneGeometry, layout: Layout) -> None:
        self.name: str = kind
        self._geometry = geometry
        self.channels = 3 if kind == "normals" else len(SEGMENTS)
        rows, cols = _frame(geometry.size, geometry.size, layout).canvas
        self.grid = (rows // layout.downsampling, cols // layout.downsampling)

    def __call__(self, key: str, layout: Layout, *, mirrored: bool) -> NDArray[np.float16]:
        maps = self._geometry.normals(key) if self.name == "normals" else self._geometry.segments(key)
        if mirrored:
            maps = maps[..., ::-1].copy()
            if self.name == "normals":
                maps[0] = -maps[0]
        placed = _frame(maps.shape[1], maps.shape[2], layout).nearest(maps)
        (rows, cols), factor = self.grid, layout.downsampling
        means: NDArray[Any] = placed.reshape(self.channels, rows, factor, cols, factor).mean(axis=(2, 4))
        return means.astype(np.float16)


class FolderFeatures:
    """`FOLDER/KEY.npy` of each sample (`KEY_mirrored.npy` of its mirror image), all of one shape [C, h, w]."""

    def __init__(self, folder: Path, reader: Reader) -> None:
        """Open the folder. UserError if it holds none of the reader's samples."""
        self._folder, self.name = folder, folder.resolve().name
        keys = reader.keys()
        first = next((key for key in keys if self._path(key).is_file()), None)
        if first is None:
            raise UserError(f"--features {folder}: it holds no KEY.npy of a sample of {reader.name}, such as {keys[0]}.npy.")
        try:
            self.channels, rows, cols = self._read(first).shape
        except (ReadError, ValueError) as error:
            raise UserError(f"--features {self._path(first)}: it is no array of numbers [C, h, w].") from error
        self.grid = (rows, cols)

    def __call__(self, key: str, layout: Layout, *, mirrored: bool) -> NDArray[np.float16]:
        name = f"{key}_mirrored" if mirrored else key
        found = self._read(name)
        if found.shape != (self.channels, *self.grid):
            raise ReadError(key, self._path(name), f"has the shape {list(found.shape)}, not {[self.channels, *self.grid]}")
        return found

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"

    def _read(self, name: str) -> NDArray[np.float16]:
        path = self._path(name)
        try:
            found = np.asarray(np.load(path, allow_pickle=False)).astype(np.float16)
        except (OSError, ValueError, TypeError) as error:
            raise ReadError(name, path, f"does not read: {error}") from error
        if not np.isfinite(found).all():
            raise ReadError(name, path, "holds numbers that are not finite in float16")
        return found


def open_features(text: str, reader: Reader, root: Path, layout: Layout) -> Features:
    """The features that `--features` names for the set of `reader` in `root`. UserError if they do not exist."""
    if text in get_args(Kind):
        kind: Kind = "normals" if text == "normals" else "segments"
        return SceneFeatures(kind, SceneGeometry(root, reader.name), layout)
    if not Path(text).is_dir():
        raise UserError(f"--features {text}: it is no folder; give one, or normals or segments for synthetic scenes.")
    return FolderFeatures(Path(text), reader)


def _frame(height: int, width: int, layout: Layout) -> Frame:
    """The frame that brings maps to the encoded size; class images are cropped."""
    return Frame(height, width, dataclasses.replace(layout, fit="crop") if layout.task == "class" else layout)
