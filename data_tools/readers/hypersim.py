"""Hypersim: the owners' HDF5 frames, or the PNG pairs and lists that Marigold's preparation makes of them."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.readers.base import Excluded, Reader, Sample, check_split, reading, wrong_root
from data_tools.readers.files import known_depth
from data_tools.readers.listed import ListedDepth
from dpt.errors import UserError

SPLIT_TABLE = "metadata_images_split_scene_v1.csv"
FOCAL, FOCAL_WIDTH = 886.81, 1024
"""Focal length, and the picture width that it holds for, in pixels."""
FARTHEST = 65.535
"""Greatest depth in metres that a 16-bit PNG in millimetres can hold."""
MIN_DEPTH_RANGE, MIN_RGB_RANGE, MAX_INVALID = 0.5, 10, 0.03
_SPLITS = ("train", "val", "test")


class HypersimPNG(ListedDepth):
    """`SPLIT/ai_VVV_NNN/rgb_cam_CC_frFFFF.png` and `depth_plane_...png`, 16-bit millimetres."""

    name = "hypersim"
    splits = _SPLITS
    lists = (
        "filename_list_{split}_filtered.txt",
        "{split}/filename_list_{split}_filtered.txt",
        "filename_list_{split}.txt",
        "{split}/filename_list_{split}.txt",
    )
    folders = ("{split}", "")
    layout = f"filename_list_SPLIT.txt with SPLIT/SCENE/rgb_*.png, depth_plane_*.png; or raw ai_*_*/images/ with {SPLIT_TABLE}"


class HypersimHDF5(Reader):
    """Raw frames: distance converted to depth, colours tone-mapped, and uninformative frames left out.

    Args:
        root: folder that holds the scenes (ai_VVV_NNN/) and the split table.
        split: train, val or test, by the owners' table.
        filtered: leave out frames with too small a range of depth or colour, or too many invalid pixels.
    """

    name = "hypersim"
    task = "depth"

    def __init__(self, root: Path | str, split: str, *, filtered: bool = True) -> None:
        check_split(self.name, split, _SPLITS)
        self.root, self.filtered = Path(root), filtered
        self._frames = {
            f"{scene}/{camera}_fr{frame:04d}": (scene, camera, frame)
            for scene, camera, frame in _frames_of_split(self.root / SPLIT_TABLE, split)
        }
        if not self._frames:
            raise UserError(
                f"{self.root / SPLIT_TABLE} lists no frame of split {split!r}; take the table that Hypersim's owners publish."
            )

    def keys(self) -> list[str]:
        return sorted(self._frames)

    def read(self, key: str) -> Sample:
        scene, camera, frame = self._frames[key]
        images = self.root / scene / "images"
        color = self._dataset(key, images / f"scene_{camera}_final_hdf5" / f"frame.{frame:04d}.color.hdf5")
        geometry = images / f"scene_{camera}_geometry_hdf5"
        distance_path = geometry / f"frame.{frame:04d}.depth_meters.hdf5"
        distance = self._dataset(key, distance_path)
        rendered = self._dataset(key, geometry / f"frame.{frame:04d}.render_entity_id.hdf5") != -1
        with reading(key, distance_path):
            rgb = tone_map(color.astype(np.float64), rendered)
            depth = np.minimum(distance_to_depth(distance.astype(np.float64)), FARTHEST).astype(np.float32)
            depth, valid = known_depth(depth, rendered)
            sample = Sample(key=key, images=(rgb,), depth=depth, valid=valid, meta={"source": key})
        reason = self._dullness(rgb, depth, rendered) if self.filtered else ""
        if reason:
            raise Excluded(key, distance_path, reason)
        return sample

    @staticmethod
    def _dataset(key: str, path: Path) -> NDArray[np.generic]:
        import h5py

        with reading(key, path), h5py.File(path, "r") as file:
            return np.asarray(file["dataset"])

    @staticmethod
    def _dullness(rgb: NDArray[np.uint8], depth: NDArray[np.float32], rendered: NDArray[np.bool_]) -> str:
        """Reason for leaving a frame out; empty: none. Depth's range counts invalid pixels as 0."""
        if float(np.ptp(depth)) < MIN_DEPTH_RANGE:
            return f"depth spans {np.ptp(depth):.2f} m, less than {MIN_DEPTH_RANGE}"
        if int(rgb.max()) - int(rgb.min()) < MIN_RGB_RANGE:
            return f"colours span {int(rgb.max()) - int(rgb.min())}, less than {MIN_RGB_RANGE}"
        invalid = 1 - float(rendered.mean())
        return f"{invalid:.1%} of the pixels are invalid, more than {MAX_INVALID:.0%}" if invalid > MAX_INVALID else ""


def distance_to_depth(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance to the camera's centre [H, W] -> depth along its axis: d f / |(x, y, f)|, (x, y) from the middle.

    The focal length is 886.81 pixels at a width of 1024 (github.com/apple/ml-hypersim, issue 9).
    """
    height, width = distance.shape
    focal = FOCAL * width / FOCAL_WIDTH
    x = np.arange(width) + 0.5 - width / 2
    y = np.arange(height)[:, None] + 0.5 - height / 2
    return distance * focal / np.sqrt(x * x + y * y + focal * focal)


def tone_map(color: NDArray[np.float64], rendered: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Linear colours [H, W, 3] -> uint8, as the owners do: the 90th percentile of brightness, where rendered, -> 0.8."""
    gamma = 1 / 2.2
    if not rendered.any():
        scale = 1.0
    else:
        brightness = float(np.percentile((color @ [0.3, 0.59, 0.11])[rendered], 90))
        scale = 0.0 if brightness < 1e-4 else 0.8 ** (1 / gamma) / brightness
    return (np.clip(np.maximum(scale * color, 0) ** gamma, 0, 1) * 255).astype(np.uint8)


def _frames_of_split(table: Path, split: str) -> list[tuple[str, str, int]]:
    with table.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        needed = {"scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name"}
        if not needed <= set(rows.fieldnames or ()):
            raise UserError(f"{table} lacks columns {sorted(needed - set(rows.fieldnames or ()))}; take the owners' table.")
        return [
            (row["scene_name"], row["camera_name"], int(row["frame_id"]))
            for row in rows
            if row["split_partition_name"] == split and row["included_in_public_release"].lower() == "true"
        ]


def open_hypersim(root: Path | str, split: str, *, filename_list: str = "", filtered: bool = True) -> Reader:
    """The raw frames if the owners' split table lies in the root, otherwise the listed PNG pairs."""
    if not Path(root).is_dir():
        raise wrong_root("hypersim", Path(root), HypersimPNG.layout)
    if not filename_list and (Path(root) / SPLIT_TABLE).is_file():
        return HypersimHDF5(root, split, filtered=filtered)
    return HypersimPNG(root, split, filename_list=filename_list)
