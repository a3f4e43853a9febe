"""Dead leaves: endless pictures with the statistics of photos, for a network that has seen only a handful of those.

Shapes of all sizes, areas falling as a power law, cover each other (Lee, Mumford and Huang 2001, "Occlusion models for natural
images"). Each has colours of the photos, a gradient, and a texture: 1/f noise or a turned piece of a photo.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 256
"""Side of the pictures, pixels."""
_OVERSAMPLED = 2 * SIZE
_LEAVES = 260
_SMALLEST, _LARGEST = 6, 400
"""Radii in oversampled pixels."""


def dead_leaves(rng: np.random.Generator, photos: Sequence[np.ndarray], noises: Sequence[np.ndarray]) -> np.ndarray:
    """One picture, uint8 [SIZE, SIZE, 3], from the colours and pieces of `photos` (uint8 [H, W, 3]) and of `noise_fields`."""
    canvas = Image.fromarray(_fill(rng, photos, noises, _OVERSAMPLED, _OVERSAMPLED))
    radii = _SMALLEST * (1.0 - rng.random(_LEAVES) * (1.0 - (_SMALLEST / _LARGEST) ** 1.2)) ** (-1 / 1.2)
    for radius in sorted(radii, reverse=True) if rng.random() < 0.5 else radii:
        side = 2 * int(radius) + 2
        left, top = (int(v) for v in rng.integers(-side // 2, _OVERSAMPLED - side // 2, 2))
        leaf = Image.fromarray(_fill(rng, photos, noises, side, side))
        canvas.paste(leaf, (left, top), _outline(rng, side))
    if rng.random() < 0.5:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 2.5)))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def noise_fields(rng: np.random.Generator) -> list[np.ndarray]:
    """Fields float32 [S, S, 3] of 1/f noise with standard deviation 1, from rough to smooth, S = 512."""
    frequency = np.hypot(np.fft.fftfreq(_OVERSAMPLED)[:, None], np.fft.rfftfreq(_OVERSAMPLED)[None]) + 1 / _OVERSAMPLED
    fields = []
    for power in (0.6, 0.9, 1.2, 1.5, 1.8):
        planes = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((_OVERSAMPLED,) * 2)) / frequency**power) for _ in range(3)]
        shared = planes[0] / planes[0].std()
        field = np.stack([shared + 0.3 * plane / plane.std() for plane in planes], axis=-1)
        fields.append((field / field.std()).astype(np.float32))
    return fields


def _fill(
    rng: np.random.Generator, photos: Sequence[np.ndarray], noises: Sequence[np.ndarray], height: int, width: int
) -> np.ndarray:
    """Surface of a leaf: uint8 [height, width, 3]."""
    photo = photos[int(rng.integers(len(photos)))]
    first, second = photo[rng.integers(photo.shape[0], size=2), rng.integers(photo.shape[1], size=2)].astype(np.float32)
    kind = rng.random()
    if kind < 0.3:
        piece = _piece(rng, photo, height, width)
        values = piece + (first - piece.mean(axis=(0, 1))) * rng.random()
    else:
        angle = rng.uniform(0, 2 * np.pi)
        rows, cols = np.linspace(-0.5, 0.5, height)[:, None], np.linspace(-0.5, 0.5, width)[None]
        ramp = (0.5 + np.cos(angle) * rows + np.sin(angle) * cols)[..., None].clip(0, 1)
        values = first + (second - first) * ramp * rng.random()
        if kind < 0.75:
            values = values + _piece(rng, noises[int(rng.integers(len(noises)))], height, width) * rng.uniform(2, 35)
    return np.asarray(values.clip(0, 255), dtype=np.uint8)


def _piece(rng: np.random.Generator, source: np.ndarray, height: int, width: int) -> np.ndarray:
    """A random piece of `source`, turned and repeated in mirror image where it is too small: float32 [height, width, 3]."""
    source = np.rot90(source, int(rng.integers(4)))
    top, left = (int(rng.integers(max(1, have - want + 1))) for have, want in zip(source.shape, (height, width), strict=False))
    piece = source[top : top + height, left : left + width].astype(np.float32)
    return np.pad(piece, [(0, height - piece.shape[0]), (0, width - piece.shape[1]), (0, 0)], mode="symmetric")


def _outline(rng: np.random.Generator, side: int) -> Image.Image:
    """The mask of an ellipse or a polygon within a square."""
    mask = Image.new("L", (side, side))
    turns = np.sort(rng.random(int(rng.integers(3, 9)))) * 2 * np.pi
    if rng.random() < 0.5:
        turns = np.linspace(0, 2 * np.pi, 40)
    angle, flat = rng.uniform(0, np.pi), rng.uniform(0.25, 1.0)
    x, y = np.cos(turns), flat * np.sin(turns)
    points = np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y], axis=1)
    ImageDraw.Draw(mask).polygon([(float(a), float(b)) for a, b in (points + 1) * side / 2], fill=255)
    return mask
