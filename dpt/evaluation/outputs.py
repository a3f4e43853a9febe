"""Output files of `dpt predict`. Every file is complete or absent."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpt.errors import UserError
from dpt.evaluation.depth_files import point_cloud, write_exr, write_ply
from dpt.evaluation.ensembling import Prediction
from dpt.evaluation.files import write_atomically, write_png
from dpt.evaluation.pictures import colour_depth, colour_error, colour_flow, overlay_mask
from dpt.pictures import flo_bytes
from dpt.tasks import image_to_uint8, task_spec

FORMATS = {
    "depth": ("npy", "png16", "colour", "exr", "ply"),
    "flow": ("flo", "colour"),
    "amodal": ("mask", "overlay", "whole"),
}
"""Output formats of each task's predictions."""
REGISTERED_FORMATS = ("npy", "colour")
"""Formats of registered tasks: the values, and the pictures that code them."""
DEFAULT_FORMATS = {"depth": ("npy", "png16", "colour")}
"""Formats written by default; all formats for tasks not listed here."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Files to write, and what a point cloud needs beyond depth up to scale and shift."""

    formats: tuple[str, ...] = ()
    """Formats to write, from `FORMATS`; empty: `DEFAULT_FORMATS`."""
    fov: float = 60.0
    """Horizontal field of view of the camera in degrees."""
    focal: float = 0.0
    """Its focal length in pixels, instead of `fov`; 0: derived from `fov`."""
    near: float = 1.0
    """Distance, in any unit, that a point cloud gives to the least depth; `far` is that of the greatest."""
    far: float = 5.0

    def __post_init__(self) -> None:
        if not 0.0 < self.fov < 180.0:
            raise UserError(f"--fov is {self.fov:g}; a field of view is between 0 and 180 degrees.")
        if self.focal < 0.0:
            raise UserError(f"--focal is {self.focal:g}; a focal length in pixels is positive.")
        if not 0.0 < self.near < self.far:
            raise UserError(f"--depth-range is {self.near:g} {self.far:g}; it must obey 0 < NEAR < FAR.")

    def for_task(self, task: str) -> tuple[str, ...]:
        """The formats for a task; UserError if the task does not support one of them."""
        spec = task_spec(task)
        if task not in FORMATS and not spec.registered:
            raise UserError(f"weights for {task} predict nothing of pictures; draw images with dpt sample.")
        known = FORMATS.get(task, REGISTERED_FORMATS)
        for name in self.formats:
            if name not in known:
                raise UserError(f"--formats {name}: predictions of {task} are written as {', '.join(known)}.")
        return self.formats or DEFAULT_FORMATS.get(task, known)


def write_outputs(
    prediction: Prediction,
    task: str,
    image: np.ndarray,
    folder: Path,
    name: str,
    *,
    config: OutputConfig | None = None,
    limits: tuple[float, float] | None = None,
) -> list[Path]:
    """Write FOLDER/NAME_*; return the files in order.

    depth: _depth.npy float32 (up to scale and shift), _depth.png 16 bits (least to greatest depth as 0 to 65535),
    _depth_colour.png, _depth.exr (float32) and _depth.ply (points with the picture's colours; see `point_cloud`: least to
    greatest depth as `config.near` to `config.far`). flow: _flow.flo in pixels, _flow.png on the colour wheel (full colour at
    the longest motion). amodal: _mask.png, _overlay.png, _whole.png (the completed object in colour, on white). Registered
    tasks: _TASK.npy, _TASK.png. With an ensemble also _uncertainty.npy and .png. image: the input
    uint8 `[H, W, 3]`. limits: least and greatest depth, or (0, motion in pixels), shared by the frames of a
    video; default: the prediction's own.
    """
    config = config or OutputConfig()
    written: list[Path] = []

    def place(suffix: str, write: Callable[[Path], object]) -> None:
        written.append(folder / f"{name}_{suffix}")
        write_atomically(written[-1], write)

    def picture(suffix: str, pixels: np.ndarray) -> None:
        written.append(folder / f"{name}_{suffix}")
        write_png(written[-1], pixels)

    value = prediction.value
    formats = config.for_task(task)
    if task == "depth":
        low, high = limits or (float(value.min()), float(value.max()))
        unit = ((value - low) / max(high - low, 1e-9)).clip(0.0, 1.0)
        if "npy" in formats:
            place("depth.npy", lambda path: _save(path, value))
        if "png16" in formats:
            picture("depth.png", (unit * 65535).round().astype(np.uint16))
        if "colour" in formats:
            picture("depth_colour.png", colour_depth(value, *(limits or np.quantile(value, (0.02, 0.98)))))
        if "exr" in formats:
            place("depth.exr", lambda path: write_exr(path, value))
        if "ply" in formats:
            focal = config.focal or 0.5 * value.shape[1] / math.tan(math.radians(config.fov) / 2)
            points = point_cloud(config.near + (config.far - config.near) * unit, focal)
            place("depth.ply", lambda path: write_ply(path, points, image))
    elif task == "flow":
        if "flo" in formats:
            place("flow.flo", lambda path: path.write_bytes(flo_bytes(value)))
        if "colour" in formats:
            picture("flow.png", colour_flow(value, limits[1] if limits else float(np.hypot(*value).max())))
    elif (encode := task_spec(task).encode) is not None:
        if "npy" in formats:
            place(f"{task}.npy", lambda path: _save(path, value))
        if "colour" in formats:
            for number, pixels in enumerate(encode(value)):
                picture(f"{task}{number or ''}.png", image_to_uint8(pixels))
    else:
        if "mask" in formats:
            picture("mask.png", value.astype(np.uint8) * 255)
        if "overlay" in formats:
            picture("overlay.png", overlay_mask(image, value))
        if "whole" in formats and prediction.whole is not None:
            picture("whole.png", prediction.whole)
    if prediction.uncertainty.any():
        place("uncertainty.npy", lambda path: _save(path, prediction.uncertainty))
        picture("uncertainty.png", colour_error(prediction.uncertainty, float(np.quantile(prediction.uncertainty, 0.99))))
    return written


def _save(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, values)


def formats_from_text(text: str) -> tuple[str, ...]:
    """ "npy,exr" -> ("npy", "exr"); UserError for unknown ones."""
    known: Sequence[str] = list(dict.fromkeys(name for names in FORMATS.values() for name in names))
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in known:
            raise UserError(f"--formats {name}: unknown; known are {', '.join(known)}.")
    return names
