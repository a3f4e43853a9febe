"""COCO's two mask encodings: run lengths and polygons.

Implemented here because pycocotools is a compiled package, of which only these two functions would be used.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SUBPIXELS = 5


def decode_rle(rle: dict[str, Any]) -> NDArray[np.bool_]:
    """{"size": [H, W], "counts": ...} -> bool [H, W].

    `counts` are run lengths down the columns, beginning with zeros: a list of numbers, or COCO's compressed text.

    Raises:
        ValueError: runs that do not fill the mask, or an invalid run-length code.
    """
    height, width = (int(side) for side in rle["size"])
    counts = rle["counts"]
    if isinstance(counts, str):
        counts = counts.encode("ascii")
    runs = np.asarray(_decompress(counts) if isinstance(counts, bytes) else counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"run lengths that sum to {runs.sum()} for a mask of {width} x {height} pixels")
    return np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(width, height).T


def _decompress(text: bytes) -> list[int]:
    """COCO's text code: numbers in groups of 5 bits, low first, at character 48 up, 32 marking more to come.

    From the third number on, each is the difference from the one two before it.
    """
    numbers: list[int] = []
    value, shift = 0, 0
    for character in text:
        group = character - 48
        if not 0 <= group < 64:
            raise ValueError(f"character {character} in compressed run lengths")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        numbers.append(value + numbers[-2] if len(numbers) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError("compressed run lengths that break off")
    return numbers


def decode_polygons(polygons: Sequence[float] | Sequence[Sequence[float]], height: int, width: int) -> NDArray[np.bool_]:
    """The union of polygons [x0, y0, x1, y1, ...] (or of a single one) as bool [H, W], by COCO's own rule.

    The outline is drawn on a grid five times finer; where it crosses the middle line of a pixel column, the mask changes there.
    """
    mask = np.zeros((height, width), np.bool_)
    many = polygons if polygons and isinstance(polygons[0], Sequence) else [polygons]
    for polygon in many:
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        if len(points) < 3:
            raise ValueError(f"a polygon of {len(points)} points")
        mask |= _fill(points, height, width)
    return mask


def _fill(points: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    fine = np.trunc(points * _SUBPIXELS + 0.5).astype(np.int64)
    outline = np.concatenate([_draw(start, end) for start, end in zip(fine, np.roll(fine, -1, axis=0), strict=True)])
    x, y = outline.T
    (steps,) = np.nonzero(x[1:] != x[:-1])
    column = (np.minimum(x[1:], x[:-1])[steps] + 0.5) / _SUBPIXELS - 0.5
    row = (np.minimum(y[1:], y[:-1])[steps] + 0.5) / _SUBPIXELS - 0.5
    crossing = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    at = column[crossing].astype(np.int64) * height + np.ceil(np.clip(row[crossing], 0, height)).astype(np.int64)
    changes = np.bincount(at, minlength=height * width + 1)[: height * width]
    return (np.cumsum(changes) % 2 == 1).reshape(width, height).T


def _draw(start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """Grid points [n, 2] of a line, one for each step along its longer side, both ends included."""
    span = np.abs(end - start)
    along = 0 if span[0] >= span[1] else 1
    low, high = (end, start) if start[along] > end[along] else (start, end)
    steps = np.arange(span[along] + 1)
    slope = (high[1 - along] - low[1 - along]) / max(int(span[along]), 1)
    line = np.empty((steps.size, 2), np.int64)
    line[:, along] = low[along] + steps
    line[:, 1 - along] = np.trunc(low[1 - along] + slope * steps + 0.5)
    return line[::-1] if low is end else line
