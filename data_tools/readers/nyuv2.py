"""NYU Depth v2, labelled part: Marigold's extracted PNG pairs and lists, or the owners' two .mat files."""

from pathlib import Path

import numpy as np

from data_tools.readers.base import Reader, Sample, check_split, reading
from data_tools.readers.files import known_depth
from data_tools.readers.listed import ListedDepth
from dpt.errors import UserError

LABELED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"


class NYUv2PNG(ListedDepth):
    name = "nyuv2"
    splits = ("test", "train", "val")
    lists = ("filename_list_{split}.txt", "labeled/filename_list_{split}.txt")
    folders = ("", "nyu_labeled_extracted")
    layout = f"filename_list_SPLIT.txt with SPLIT/SCENE/rgb_NNNN.png, depth_NNNN.png; or {LABELED} and {SPLITS}"


class NYUv2Mat(Reader):
    """The owners' files: HDF5 `images` [N, 3, W, H], `rawDepths` [N, W, H] metres; `trainNdxs`, `testNdxs` from 1."""

    name = "nyuv2"
    task = "depth"

    def __init__(self, root: Path | str, split: str) -> None:
        from scipy.io import loadmat

        check_split(self.name, split, ("test", "train"))
        self.path = Path(root) / LABELED
        try:
            indices = loadmat(Path(root) / SPLITS)[f"{split}Ndxs"].ravel()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{Path(root) / SPLITS} does not read ({error}); fetch it again.") from error
        self._indices = {f"{int(index):04d}": int(index) - 1 for index in indices}

    def keys(self) -> list[str]:
        return sorted(self._indices)

    def read(self, key: str) -> Sample:
        import h5py

        with reading(key, self.path), h5py.File(self.path, "r") as file:
            index = self._indices[key]
            rgb = np.ascontiguousarray(file["images"][index].transpose(2, 1, 0))
            depth, valid = known_depth(np.ascontiguousarray(file["rawDepths"][index].T, dtype=np.float32))
            return Sample(key=key, images=(rgb,), depth=depth, valid=valid, meta={"source": f"{LABELED}#{key}"})


def open_nyuv2(root: Path | str, split: str, *, filename_list: str = "") -> Reader:
    """The .mat files if they exist, otherwise the extracted pictures."""
    if not filename_list and (Path(root) / LABELED).is_file() and (Path(root) / SPLITS).is_file():
        return NYUv2Mat(root, split)
    return NYUv2PNG(root, split, filename_list=filename_list)
