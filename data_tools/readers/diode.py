"""DIODE validation: PNG pictures, depth and mask as .npy, as its owners pack them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.readers.listed import Entry, ListedDepth


class DIODE(ListedDepth):
    """Works without a list too: every `X.png` beside an `X_depth.npy`, indoors and outdoors."""

    name = "diode"
    splits = ("val", "test", "train")
    lists = ("filename_list_{split}.txt", "diode_{split}_all_filename_list.txt")
    folders = ("", "{split}", "diode_{split}")
    layout = "indoors/ and outdoors/ (or val/indoors, ...) with scene_NNNNN/scan_NNNNN/X.png, X_depth.npy, X_depth_mask.npy"

    def walk(self) -> list[Entry]:
        for folder in self._folders:
            scenes = (folder / place for place in ("indoors", "outdoors"))
            depths = [
                path.relative_to(folder).as_posix() for scene in scenes for path in scene.glob("scene_*/scan_*/*_depth.npy")
            ]
            if depths:
                stems = [path.removesuffix("_depth.npy") for path in depths]
                return [(f"{stem}.png", f"{stem}_depth.npy", f"{stem}_depth_mask.npy") for stem in stems]
        return []

    def decode(self, path: Path, entry: Entry, rgb: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        mask_path = self.locate(entry[2] if len(entry) > 2 else entry[1].removesuffix(".npy") + "_mask.npy")
        depth = np.load(path, allow_pickle=False).astype(np.float32)
        mask = np.load(mask_path, allow_pickle=False) > 0
        return (depth[..., 0] if depth.ndim == 3 else depth), mask
