"""FlyingChairs: pairs of .ppm frames, .flo truth and a split file."""

from pathlib import Path

import numpy as np

from data_tools.readers.base import Reader, Sample, check_split, first_existing, reading, wrong_root
from data_tools.readers.files import UNKNOWN_FLOW, read_lines, read_rgb
from dpt.errors import UserError
from dpt.pictures import read_flo

SPLIT_FILE = "FlyingChairs_train_val.txt"
SPLIT_NUMBERS = {"train": 1, "val": 2, "test": 3}
"""Numbers in the split file; FlyingChairs itself has no test split."""


class FlyingChairs(Reader):
    """`data/NNNNN_img1.ppm`, `_img2.ppm`, `_flow.flo`; line i of the split file (1 train, 2 val) is the i-th pair by name."""

    name = "flying_chairs"
    task = "flow"

    def __init__(self, root: Path | str, split: str) -> None:
        check_split(self.name, split, tuple(SPLIT_NUMBERS))
        self.root = Path(root)
        roots = (self.root, self.root / "FlyingChairs_release")
        self._data, split_file = (first_existing(root / name for root in roots) for name in ("data", SPLIT_FILE))
        if self._data is None or split_file is None:
            raise wrong_root(self.name, self.root, f"data/NNNNN_img1.ppm, _img2.ppm, _flow.flo and {SPLIT_FILE}")
        stems = sorted(path.name.removesuffix("_img1.ppm") for path in self._data.glob("*_img1.ppm"))
        numbers = read_lines(split_file)
        if len(numbers) != len(stems):
            raise UserError(
                f"{split_file} has {len(numbers)} lines for {len(stems)} pairs in {self._data}; unpack the set again."
            )
        self._keys = [stem for stem, number in zip(stems, numbers, strict=True) if number == str(SPLIT_NUMBERS[split])]

    def keys(self) -> list[str]:
        return list(self._keys)

    def read(self, key: str) -> Sample:
        assert self._data is not None
        frames = []
        for number in (1, 2):
            path = self._data / f"{key}_img{number}.ppm"
            with reading(key, path):
                frames.append(read_rgb(path, upright=False))
        path = self._data / f"{key}_flow.flo"
        with reading(key, path):
            flow = read_flo(path)
            valid = np.isfinite(flow).all(axis=0) & (np.abs(flow).max(axis=0) < UNKNOWN_FLOW)
            flow = np.where(valid, flow, np.float32(0))
            return Sample(key=key, images=tuple(frames), flow=flow, valid=valid, meta={"source": f"data/{key}_img1.ppm"})
