"""Reading single files of the formats that data sets come in."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpt.errors import UserError
from dpt.pictures import decode_picture

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp")
UNKNOWN_FLOW = 1e9
"""A flow beyond this is unknown (Middlebury's convention)."""


def read_rgb(source: Path | bytes, *, upright: bool = True) -> NDArray[np.uint8]:
    """A picture file (or its bytes) as uint8 [H, W, 3]; `upright=False` where a truth lies on the stored pixels."""
    return decode_picture(source, upright=upright)


def read_png16(path: Path, units_per_metre: float) -> NDArray[np.float32]:
    """A 16-bit grey PNG as float32 [H, W] metres.

    Raises:
        ValueError: another kind of picture.
    """
    with Image.open(path) as image:
        if image.mode not in ("I;16", "I;16B", "I"):
            raise ValueError(f"a picture of mode {image.mode} where 16-bit grey is expected")
        return (np.asarray(image).astype(np.float64) / units_per_metre).astype(np.float32)


def mask_image(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """bool [H, W] as a picture uint8 [H, W, 3] of 0 and 255."""
    return np.repeat(mask[:, :, None], 3, axis=2).astype(np.uint8) * np.uint8(255)


def known_depth(
    depth: NDArray[np.float32], valid: NDArray[np.bool_] | np.bool_ = np.True_
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Depth [H, W], 0 where unknown, and the mask of where it is known: `valid`, finite and positive."""
    known = valid & np.isfinite(depth) & (depth > 0)
    return np.where(known, depth, np.float32(0)), known


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file.

    Raises:
        UserError: it is missing or not text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the list does not read ({error}); give another one.") from error


def find_images(folder: Path) -> list[Path]:
    """All picture files under a folder, sorted by path; by name alone, as checking a million files one by one is slow."""
    places = ((Path(place), names) for place, _, names in os.walk(folder, followlinks=True))
    return sorted(place / name for place, names in places for name in names if name.lower().endswith(IMAGE_SUFFIXES))
