"""KITTI: the Eigen test split with the improved ground truth of the depth benchmark, listed by BTS and Marigold."""

from dataclasses import replace

from data_tools.readers.base import Sample
from data_tools.readers.listed import ListedDepth

CROP = (352, 1216)
"""Height and width of the depth benchmark's frames: cut from the whole ones at the bottom, in the middle."""


class KITTI(ListedDepth):
    """Frames are cut to the benchmark's size, as everybody does before predicting: the rest has no ground truth."""

    name = "kitti"
    version = 2
    lists = ("filename_list_{split}.txt", "eigen_test_files_with_gt.txt", "kitti_eigen_split/eigen_test_files_with_gt.txt")
    folders = ("", "raw_data", "train", "val", "data_depth_annotated", "data_depth_annotated/train", "data_depth_annotated/val")
    layout = "eigen_test_files_with_gt.txt (or filename_list=), raw drives (2011_09_26/...) and annotated depth (train/, val/)"
    units_per_metre = 256.0

    def read(self, key: str) -> Sample:
        sample = super().read(key)
        assert sample.depth is not None
        assert sample.valid is not None
        (image,) = sample.images
        height, width = (min(have, wanted) for have, wanted in zip(image.shape[:2], CROP, strict=True))
        top, left = image.shape[0] - height, (image.shape[1] - width) // 2
        cut = (slice(top, top + height), slice(left, left + width))
        return replace(sample, images=(image[cut],), depth=sample.depth[cut], valid=sample.valid[cut])
