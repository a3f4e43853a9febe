"""Read picture files: the only way to colours, masks and flow. Needs numpy and Pillow only."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dpt.errors import UserError

_FLO_MAGIC = 202021.25


def decode_picture(source: Path | bytes, *, upright: bool = True) -> np.ndarray:
    """Decode a picture file (or its bytes) to uint8 `[H, W, 3]`: grey, palette, CMYK and alpha are converted, 16 bits become 8.

    upright: rotated by its EXIF orientation; False: the pixels as stored, which truths on the same grid match.
    Raises Pillow's errors (OSError, ...) if it cannot be decoded.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        turned = ImageOps.exif_transpose(image) if upright else image
        if turned.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")
        if _is_deep(turned):
            grey = np.rint(np.asarray(turned).astype(np.float64) / 257.0).clip(0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        return np.array(turned.convert("RGB"))


def decode_mask(source: Path | bytes, *, upright: bool = True) -> np.ndarray:
    """Decode a mask's file to bool `[H, W]`: a picture, or an .npy array of bool or numbers, `[H, W]` or with channels last.

    True from the middle of its range up: 1, 255 or 65535, the smallest that its numbers fit in.
    """
    if isinstance(source, Path) and source.suffix.lower() == ".npy":
        return _threshold(np.load(source, allow_pickle=False))
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        turned = ImageOps.exif_transpose(image) if upright else image
        if turned.mode == "P" and np.asarray(turned).max() <= 1:  # palettes of two entries number them
            values = np.asarray(turned)
        else:
            values = np.asarray(turned if _is_deep(turned) or turned.mode == "1" else turned.convert("L"))
    return _threshold(values)


def _threshold(values: np.ndarray) -> np.ndarray:
    """Convert numbers or bool, `[H, W]` or `[H, W, C]` (only the first channel counts), to bool `[H, W]`."""
    values = values[..., 0] if values.ndim == 3 else values
    if values.ndim != 2 or not values.size or values.dtype.kind not in "buif":
        raise ValueError(f"an array of shape {list(values.shape)} and type {values.dtype} is no mask")
    top = 1 if values.max() <= 1 else 255 if values.max() <= 255 else 65535
    return np.asarray(values > top / 2)


def _is_deep(image: Image.Image) -> bool:
    """Whether the image is 16-bit grey, which Pillow's own conversion to 8 bits clips."""
    return image.mode == "I" or image.mode.startswith("I;16")


def read_picture(path: Path) -> np.ndarray:
    """Decode a picture that a user names with `decode_picture`; UserError if it is not a picture."""
    try:
        return decode_picture(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a picture that can be read ({error}).") from error


def read_mask(path: Path) -> np.ndarray:
    """Decode a mask that a user names with `decode_mask`; UserError if it is not one, or is empty."""
    try:
        mask = decode_mask(path)
    except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a mask that can be read ({error}).") from error
    if not mask.any():
        raise UserError(f"{path}: the mask is empty; it must show the object's visible part, white on black.")
    return mask


def read_flo(path: Path) -> np.ndarray:
    """Read a Middlebury .flo file as float32 `[2, H, W]` in pixels. ValueError for a wrong mark or length."""
    content = path.read_bytes()
    if len(content) < 12:
        raise ValueError(f"{len(content)} bytes are too few for a .flo header")
    magic, width, height = struct.unpack("<fii", content[:12])
    if magic != _FLO_MAGIC:
        raise ValueError(f"a .flo file begins with {_FLO_MAGIC}, this one with {magic}")
    if width < 1 or height < 1 or len(content) != 12 + 8 * width * height:
        raise ValueError(f"{len(content)} bytes do not hold a flow of {width} x {height} pixels")
    flow = np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2)
    return np.ascontiguousarray(np.moveaxis(flow, -1, 0), dtype=np.float32)


def flo_bytes(flow: np.ndarray) -> bytes:
    """Encode float `[2, H, W]` in pixels as a Middlebury .flo file."""
    _, height, width = flow.shape
    return struct.pack("<fii", _FLO_MAGIC, width, height) + np.ascontiguousarray(np.moveaxis(flow, 0, -1), "<f4").tobytes()
