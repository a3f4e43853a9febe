"""Scenes as files, in the native layouts of the data sets they stand in for."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.synthesis.generation import SPLITS
from data_tools.synthesis.rendering import SceneTruth
from data_tools.synthesis.shapes import CLASS_NAMES
from dpt.pictures import flo_bytes

TASKS: dict[str, str] = {"class": "imagenet", "depth": "hypersim", "flow": "flying_chairs", "amodal": "pix2gestalt"}
"""Folder (and data set) whose layout each task takes."""
FRAMES_PER_FOLDER = 100


def write_scene(root: Path, tasks: tuple[str, ...], split: str, number: int, truth: SceneTruth) -> None:
    """Write one scene's files. `number` counts from 0 over all splits, one after the other."""
    image = _encoded(truth.image)  # three layouts hold it: encode it once
    for task in tasks:
        _WRITERS[task](root / TASKS[task], split, number, truth, image)


def write_lists(root: Path, tasks: tuple[str, ...], splits: dict[str, int]) -> None:
    """Write the split files of each layout; `splits`: scenes per split, in the order of their numbers."""
    names = [split for split, count in splits.items() for _ in range(count)]
    if "class" in tasks:  # every class in every split, if only as an empty folder: labels number the folders
        for folder in (root / TASKS["class"] / split / name for split in splits for name in CLASS_NAMES):
            folder.mkdir(parents=True, exist_ok=True)
    if "depth" in tasks:
        for split in splits:
            pairs = (hypersim_names(number) for number, name in enumerate(names) if name == split)
            _write_text(root / TASKS["depth"] / f"filename_list_{split}.txt", [f"{rgb} {depth}" for rgb, depth in pairs])
    if "flow" in tasks:  # 1 and 2 are FlyingChairs' own; 3 marks a test split, which FlyingChairs does not have
        _write_text(root / TASKS["flow"] / "FlyingChairs_train_val.txt", [str(SPLITS.index(name) + 1) for name in names])
    if "amodal" in tasks:
        for split in splits:
            members = [_stem(number) for number, name in enumerate(names) if name == split]
            _write_text(root / TASKS["amodal"] / f"{split}.txt", members)


def hypersim_names(number: int) -> tuple[str, str]:
    """Paths of the RGB and depth files of a frame, relative to the split's folder."""
    folder, frame = divmod(number, FRAMES_PER_FOLDER)
    scene = f"ai_{folder // 1000:03d}_{folder % 1000:03d}"
    return f"{scene}/rgb_cam_00_fr{frame:04d}.png", f"{scene}/depth_plane_cam_00_fr{frame:04d}.png"


def depth_to_uint16(depth: NDArray[Any], units_per_metre: float = 1000) -> NDArray[np.uint16]:
    """Metres to 16-bit units (millimetres); values out of range become the nearest in range."""
    return np.clip(np.rint(depth * units_per_metre), 0, 65535).astype(np.uint16)


def _stem(number: int) -> str:
    return f"{number + 1:07d}"


def _write_class(root: Path, split: str, number: int, truth: SceneTruth, image: bytes) -> None:
    _write(root / split / truth.class_name / f"{_stem(number)}.png", image)


def _write_depth(root: Path, split: str, number: int, truth: SceneTruth, image: bytes) -> None:
    rgb, depth = hypersim_names(number)
    _write(root / split / rgb, image)
    _write(root / split / depth, _encoded(depth_to_uint16(truth.depth)))


def _write_flow(root: Path, split: str, number: int, truth: SceneTruth, image: bytes) -> None:
    stem = f"{number + 1:05d}"
    _write(root / "data" / f"{stem}_img1.ppm", _encoded(truth.image, "PPM"))
    _write(root / "data" / f"{stem}_img2.ppm", _encoded(truth.next_image, "PPM"))
    _write(root / "data" / f"{stem}_flow.flo", flo_bytes(truth.flow))


def _write_amodal(root: Path, split: str, number: int, truth: SceneTruth, image: bytes) -> None:
    stem = _stem(number)
    _write(root / "occlusion" / f"{stem}_occlusion.png", image)
    _write(root / "whole" / f"{stem}_whole.png", _encoded(truth.whole))
    _write(root / "whole_mask" / f"{stem}_whole_mask.png", _encoded(truth.whole_mask.astype(np.uint8) * 255))
    _write(root / "visible_object_mask" / f"{stem}_visible_mask.png", _encoded(truth.visible_mask.astype(np.uint8) * 255))


_WRITERS: dict[str, Callable[[Path, str, int, SceneTruth, bytes], None]] = {
    "class": _write_class,
    "depth": _write_depth,
    "flow": _write_flow,
    "amodal": _write_amodal,
}


def _encoded(pixels: NDArray[Any], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, compress_level=1)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except FileNotFoundError:  # the first file of its folder
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _write_text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
