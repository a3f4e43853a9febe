"""Small data sets in the layouts of real ones, and what their samples must be."""

import json
from pathlib import Path

import numpy as np

from data_tools.native.files import save, write
from data_tools.readers import Reader, Sample
from dpt.pictures import flo_bytes

RNG = np.random.default_rng(0)


def picture(height: int = 12, width: int = 16) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def read_all(reader: Reader) -> dict[str, Sample]:
    keys = reader.keys()
    assert keys == list(dict.fromkeys(keys))
    samples = {key: reader.read(key) for key in keys}
    for key, sample in samples.items():
        assert sample.key == key
        assert isinstance(sample.meta["source"], str)
        json.dumps(sample.meta)
    return samples


DEPTH = RNG.uniform(0.5, 9, (12, 16)).round(3)
DEPTH[0, :3] = 0


def check_depth(sample: Sample, expected: np.ndarray = DEPTH, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(sample.depth, expected, atol=tolerance)
    np.testing.assert_array_equal(sample.valid, expected > 0)


def chairs(root: Path, numbers: list[int]) -> None:
    for index in range(len(numbers)):
        save(root / "data" / f"{index + 1:05d}_img1.ppm", np.full((6, 8, 3), index, np.uint8))
        save(root / "data" / f"{index + 1:05d}_img2.ppm", picture(6, 8))
        write(root / "data" / f"{index + 1:05d}_flow.flo", flo_bytes(np.full((2, 6, 8), index + 0.5)))
    write(root / "FlyingChairs_train_val.txt", "\n".join(map(str, numbers)))
