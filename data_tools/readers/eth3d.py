"""ETH3D, high-resolution multi-view training scenes: DSLR pictures, depth as raw float32."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.readers.listed import Entry, ListedDepth


class ETH3D(ListedDepth):
    """Works without a list too: every picture of `dslr_jpg` beside its file of `dslr_depth`, as the archives unpack."""

    name = "eth3d"
    splits = ("test", "val", "train")
    lists = ("filename_list_{split}.txt", "eth3d_filename_list.txt")
    layout = (
        "eth3d_filename_list.txt with rgb/ and depth/, or SCENE/images/dslr_images/X.JPG and "
        "SCENE/ground_truth_depth/dslr_images/X.JPG (raw float32 in spite of the name)"
    )

    def walk(self) -> list[Entry]:
        depths = [path.relative_to(self.root) for path in self.root.glob("*/ground_truth_depth/dslr_images/*.JPG")]
        return [(f"{depth.parts[0]}/images/dslr_images/{depth.name}", depth.as_posix()) for depth in depths]

    def decode(self, path: Path, entry: Entry, rgb: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Raw little-endian float32 of the picture's size (4032 x 6048), row by row; inf where unknown."""
        depth = np.fromfile(path, "<f4")
        if depth.size != rgb.shape[0] * rgb.shape[1]:
            raise ValueError(f"{depth.size} values for a picture of {rgb.shape[1]} x {rgb.shape[0]} pixels")
        depth = depth.reshape(rgb.shape[:2]).astype(np.float32)
        return depth, np.isfinite(depth)
