"""Writing single files of the formats that data sets come in (`data_tools.readers.files` reads them)."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.synthesis.layouts import depth_to_uint16


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def save(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    """Write a picture in the format that its name ends in; `options` are those of Pillow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def save_depth(path: Path, depth: NDArray[Any], units_per_metre: float = 1000) -> Path:
    """Write depth [H, W] in metres as a 16-bit PNG."""
    return save(path, depth_to_uint16(depth, units_per_metre))


def save_array(path: Path, array: NDArray[Any]) -> Path:
    """Write an .npy file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=False)
    return path


def save_hdf5(path: Path, **datasets: NDArray[Any]) -> Path:
    """Write an HDF5 file of these datasets."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in datasets.items():
            file.create_dataset(name, data=array)
    return path


def encode_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """bool [H, W] as COCO's compressed run lengths, {"size": [H, W], "counts": text}."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size])
    counts = [0, *runs.tolist()] if flat[0] else runs.tolist()
    numbers = [count - counts[i - 2] if i > 2 else count for i, count in enumerate(counts)]
    return {"size": list(mask.shape), "counts": "".join(map(_groups, numbers))}


def _groups(number: int) -> str:
    """One number in groups of 5 bits, low first, at character 48 up; 32 marks more to come, 16 of the last is the sign."""
    text = ""
    while True:
        group, number = number & 31, number >> 5
        ended = number == (-1 if group & 16 else 0)
        text += chr(48 + (group if ended else group | 32))
        if ended:
            return text
