"""Depth sets with samples listed in a text file, one `RGB DEPTH ...` per line, paths relative to the set (as Marigold's)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.readers.base import Reader, Sample, check_split, first_existing, reading, wrong_root
from data_tools.readers.files import known_depth, read_lines, read_png16, read_rgb
from dpt.errors import UserError

Entry = tuple[str, ...]
"""Paths of one sample relative to the set: picture, depth, and whatever else its line names."""


class ListedDepth(Reader):
    """Base class of such readers: a subclass names its set and where things are, and decodes depth unless it is a 16-bit PNG.

    Args:
        root: folder of the set.
        split: one of `splits`.
        filename_list: the list, relative to the root or the working folder; by default the first of `lists` that exists.
    """

    task = "depth"
    splits: tuple[str, ...] = ("test", "val")
    lists: tuple[str, ...] = ()
    """Paths under the root where the list may be; {split} is filled in."""
    folders: tuple[str, ...] = ("",)
    """Folders under the root to which paths may be relative; {split} is filled in."""
    layout: str
    """Expected contents of the root, for the error message."""
    units_per_metre: float = 1000.0
    """Units per metre of 16-bit PNG depth."""

    def __init__(self, root: Path | str, split: str, *, filename_list: str = "") -> None:
        check_split(self.name, split, self.splits)
        self.root, self.split = Path(root), split
        self._folders = [self.root / folder.format(split=split) for folder in self.folders]
        path = self._find_list(filename_list)
        entries = self.walk() if path is None else [tuple(line.split()) for line in read_lines(path)]
        for entry in entries:
            if len(entry) < 2:
                raise UserError(f"{path}: the line {' '.join(entry)!r} does not name a picture and a depth file.")
        self._entries = {entry[0].rpartition(".")[0]: entry for entry in entries if entry[1] != "None"}  # no truth: left out
        if not self._entries:
            raise wrong_root(self.name, self.root, self.layout)

    def keys(self) -> list[str]:
        return sorted(self._entries)

    def read(self, key: str) -> Sample:
        entry = self._entries[key]
        rgb_path, depth_path = self.locate(entry[0]), self.locate(entry[1])
        with reading(key, rgb_path):
            rgb = read_rgb(rgb_path, upright=False)
        with reading(key, depth_path):
            depth, valid = known_depth(*self.decode(depth_path, entry, rgb))
            return Sample(key=key, images=(self.match(rgb, depth),), depth=depth, valid=valid, meta={"source": entry[0]})

    def walk(self) -> list[Entry]:
        """Entries found without a list; UserError for sets that need one."""
        raise wrong_root(self.name, self.root, self.layout)

    def decode(self, path: Path, entry: Entry, rgb: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Depth float32 [H, W] in metres, and where the files call it valid, bool [H, W]."""
        depth = read_png16(path, self.units_per_metre)
        return depth, np.ones(depth.shape, np.bool_)

    def match(self, rgb: NDArray[np.uint8], depth: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The picture at the depth map's size, where a set stores the two at different sizes."""
        return rgb

    def locate(self, relative: str) -> Path:
        """The file in the first folder that has it; in the first folder if none has."""
        return first_existing(folder / relative for folder in self._folders) or self._folders[0] / relative

    def _find_list(self, given: str) -> Path | None:
        if given:
            return next((path for path in (self.root / given, Path(given)) if path.is_file()), Path(given))
        places = (self.root / place.format(split=self.split) for place in self.lists)
        return next((path for path in places if path.is_file()), None)
