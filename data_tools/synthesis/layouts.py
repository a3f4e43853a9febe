"""Scenes as files, in the native layouts of the data sets they stand for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.synthesis.rendering import SceneTruth
from data_tools.synthesis.scenes import SPLITS

TASKS: dict[str, str] = {"class": "imagenet", "depth": "hypersim", "flow": "flying_chairs", "amodal": "pix2gestalt"}
"""Task: folder (and data set) whose layout it takes."""
FRAMES_PER_FOLDER = 100
_FLO_MAGIC = np.float32(202021.25)


def write_scene(root: Path, tasks: tuple[str, ...], split: str, number: int, truth: SceneTruth) -> None:
    """Write one scene's files. `number` counts from 0 over all splits, one after the other."""
    for task in tasks:
        _WRITERS[task](root / TASKS[task], split, number, truth)


def write_lists(root: Path, tasks: tuple[str, ...], splits: dict[str, int]) -> None:
    """Write the split files of each layout; `splits` are scenes a split, in the order of their numbers."""
    names = [split for split, count in splits.items() for _ in range(count)]
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


def depth_to_millimetres(depth: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Metres to 16-bit millimetres; depths beyond 65.535 m are clamped."""
    return np.clip(np.rint(depth * 1000), 0, 65535).astype(np.uint16)


def _stem(number: int) -> str:
    return f"{number + 1:07d}"


def _write_class(root: Path, split: str, number: int, truth: SceneTruth) -> None:
    _write_image(root / split / truth.class_name / f"{_stem(number)}.png", truth.image)


def _write_depth(root: Path, split: str, number: int, truth: SceneTruth) -> None:
    rgb, depth = hypersim_names(number)
    _write_image(root / split / rgb, truth.image)
    _write_image(root / split / depth, depth_to_millimetres(truth.depth))


def _write_flow(root: Path, split: str, number: int, truth: SceneTruth) -> None:
    stem = root / "data" / f"{number + 1:05d}"
    _write_image(Path(f"{stem}_img1.ppm"), truth.image)
    _write_image(Path(f"{stem}_img2.ppm"), truth.next_image)
    height, width = truth.depth.shape
    header = _FLO_MAGIC.astype("<f4").tobytes() + np.array([width, height], "<i4").tobytes()
    Path(f"{stem}_flow.flo").write_bytes(header + np.moveaxis(truth.flow, 0, -1).astype("<f4").tobytes())


def _write_amodal(root: Path, split: str, number: int, truth: SceneTruth) -> None:
    stem = _stem(number)
    _write_image(root / "occlusion" / f"{stem}_occlusion.png", truth.occlusion)
    _write_image(root / "whole" / f"{stem}_whole.png", truth.whole)
    _write_image(root / "whole_mask" / f"{stem}_whole_mask.png", truth.whole_mask.astype(np.uint8) * 255)
    _write_image(root / "visible_object_mask" / f"{stem}_visible_mask.png", truth.visible_mask.astype(np.uint8) * 255)


_WRITERS: dict[str, Callable[[Path, str, int, SceneTruth], None]] = {
    "class": _write_class,
    "depth": _write_depth,
    "flow": _write_flow,
    "amodal": _write_amodal,
}


def _write_image(path: Path, pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)  # ignored by formats other than PNG


def _write_text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
