"""KITTI: the Eigen test split with the improved ground truth of the depth benchmark, listed by BTS and Marigold."""

from data_tools.readers.listed import ListedDepth


class KITTI(ListedDepth):
    name = "kitti"
    lists = (
        "filename_list_{split}.txt",
        "eigen_test_files_with_gt.txt",
        "kitti_eigen_split/eigen_test_files_with_gt.txt",
    )
    folders = ("", "raw_data", "train", "val", "data_depth_annotated", "data_depth_annotated/train", "data_depth_annotated/val")
    layout = "eigen_test_files_with_gt.txt (or filename_list=), raw drives (2011_09_26/...) and annotated depth (train/, val/)"
    units_per_metre = 256.0
