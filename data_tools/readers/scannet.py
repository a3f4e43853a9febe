"""ScanNet v2 validation frames, exported with the set's own SensReader; Marigold's list of 800."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.readers.listed import ListedDepth


class ScanNet(ListedDepth):
    name = "scannet"
    lists = ("filename_list_{split}.txt", "scannet_val_sampled_list_800_1.txt")
    folders = ("", "scans", "{split}")
    layout = "scannet_val_sampled_list_800_1.txt (or filename_list=) and sceneNNNN_NN/color/N.jpg, sceneNNNN_NN/depth/N.png"

    def match(self, rgb: NDArray[np.uint8], depth: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Exported colour is 1296 x 968, depth 640 x 480, of one view: colour comes down to depth's size."""
        if rgb.shape[:2] == depth.shape:
            return rgb
        height, width = depth.shape
        if abs(rgb.shape[1] * height - rgb.shape[0] * width) > 0.01 * rgb.shape[0] * width:
            raise ValueError(
                f"a picture of {rgb.shape[1]} x {rgb.shape[0]} and a depth map of {width} x {height} differ in shape"
            )
        return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.LANCZOS))
