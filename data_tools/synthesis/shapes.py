"""The solids of the synthetic scenes: unions of convex parts that a ray meets in closed form.

A solid lives in the unit cube [-1, 1]^3 (y up, y = -1 on the ground). A part is the intersection of at most one quadric and any
number of half-spaces, so a ray is inside it on one interval [enter, leave], found without iteration.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

QUADRIC_FACE = 15
"""Face number of a part's curved surface; its planes are 0..14."""
FACES_PER_PART = 16
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Quadric:
    """{p : sum(squares p^2) + linear . p + constant <= 0}."""

    squares: NDArray[np.float64]
    linear: NDArray[np.float64]
    constant: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """A quadric and {p : normals @ p <= offsets}; either may be missing."""

    quadric: Quadric | None
    normals: NDArray[np.float64]
    """[m, 3], unit length."""
    offsets: NDArray[np.float64]
    """[m]."""


def _part(quadric: tuple[float, float, float, float, float] | None, planes: list[tuple[float, float, float, float]]) -> Part:
    """Build a part from a x^2 + b y^2 + c z^2 + e y + g <= 0, as (a, b, c, e, g), and planes as (nx, ny, nz, offset)."""
    table = np.asarray(planes, np.float64).reshape(-1, 4)
    lengths = np.linalg.norm(table[:, :3], axis=1)
    solid = None
    if quadric is not None:
        a, b, c, e, g = quadric
        solid = Quadric(squares=np.array([a, b, c]), linear=np.array([0.0, e, 0.0]), constant=g)
    return Part(quadric=solid, normals=table[:, :3] / lengths[:, None], offsets=table[:, 3] / lengths)


def _slab(low: float, high: float) -> list[tuple[float, float, float, float]]:
    return [(0, 1, 0, high), (0, -1, 0, -low)]


def _box(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float]) -> Part:
    return _part(None, [(1, 0, 0, x[1]), (-1, 0, 0, -x[0]), (0, 0, 1, z[1]), (0, 0, -1, -z[0]), *_slab(*y)])


def _ellipsoid(y: float, radius: float, half_height: float, planes: list[tuple[float, float, float, float]]) -> Part:
    """x^2 + z^2 <= radius^2 (1 - ((Y - y) / half_height)^2)."""
    b = (radius / half_height) ** 2
    return _part((1, b, 1, -2 * b * y, b * y * y - radius * radius), planes)


def _tube(radius: float, low: float, high: float) -> Part:
    return _part((1, 0, 1, 0, -radius * radius), _slab(low, high))


def _prism(sides: int, top: float) -> Part:
    """A regular prism whose walls lean inward by `top` (1: a pyramid), inscribed in the unit circle at the ground."""
    angles = 2 * np.pi * (np.arange(sides) + 0.5) / sides
    apothem = float(np.cos(np.pi / sides))
    walls = [(float(np.cos(a)), apothem * top / 2, float(np.sin(a)), apothem * (1 - top / 2)) for a in angles]
    return _part(None, walls + _slab(-1, 1))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A class of objects: its geometry and the proportions it comes in."""

    parts: tuple[Part, ...]
    width: tuple[float, float]
    """Range of half width over half height."""
    corners: Literal["none", "rim", "all"]
    """Farthest points from the centre: an axis's end, a circle about the top or bottom, or the corners of the box."""
    height: float = 1.0
    """Height relative to other shapes, so that all classes fill about as much of a picture."""
    fill: float = 1.0
    """About how much of its bounding rectangle the silhouette fills at mid height."""
    square_base: bool = True
    """Same scale along x and z."""

    @cached_property
    def plane_normals(self) -> Array:
        """Plane normals by face, float32 [faces, 3]; 0 for curved ones."""
        table = np.zeros((len(self.parts) * FACES_PER_PART, 3), np.float32)
        for number, part in enumerate(self.parts):
            table[number * FACES_PER_PART : number * FACES_PER_PART + len(part.normals)] = part.normals
        return table


_LEG = 0.16
SHAPES: dict[str, Shape] = {
    "box": Shape(parts=(_box((-1, 1), (-1, 1), (-1, 1)),), corners="all", width=(0.6, 1.0), square_base=False),
    "capsule": Shape(
        parts=(_tube(1.0, -0.5, 0.5), _ellipsoid(0.5, 1.0, 0.5, _slab(0.5, 1)), _ellipsoid(-0.5, 1.0, 0.5, _slab(-1, -0.5))),
        corners="none",
        width=(0.5, 0.62),
        height=1.15,
    ),
    "cone": Shape(
        parts=(_part((1, -0.25, 1, 0.5, -0.25), _slab(-1, 1)),), corners="rim", width=(0.8, 1.0), height=1.2, fill=0.5
    ),
    "cylinder": Shape(parts=(_tube(1.0, -1, 1),), corners="rim", width=(0.55, 0.85)),
    "ellipsoid": Shape(parts=(_ellipsoid(0, 1, 1, []),), corners="none", width=(1.45, 1.8), height=0.8),
    "mushroom": Shape(
        parts=(_tube(0.32, -1, 0.2), _ellipsoid(0.0, 1.0, 1.0, _slab(0.0, 1))), corners="rim", width=(0.8, 1.0), fill=0.75
    ),
    "prism": Shape(parts=(_prism(6, 0.0),), corners="rim", width=(0.7, 0.95)),
    "pyramid": Shape(parts=(_prism(4, 1.0),), corners="rim", width=(1.05, 1.35), height=1.15, fill=0.5),
    "sphere": Shape(parts=(_ellipsoid(0, 1, 1, []),), corners="none", width=(1.0, 1.0)),
    "table": Shape(
        parts=(
            _box((-1, 1), (0.72, 1), (-1, 1)),
            *(
                _box((x - _LEG, x + _LEG), (-1, 0.72), (z - _LEG, z + _LEG))
                for x in (-1 + _LEG, 1 - _LEG)
                for z in (-1 + _LEG, 1 - _LEG)
            ),
        ),
        corners="all",
        width=(1.1, 1.4),
        height=0.8,
    ),
}
CLASS_NAMES: tuple[str, ...] = tuple(sorted(SHAPES))
"""Class names in label order (sorted, as ImageNet's folders are)."""


def intersect(shape: Shape, origin: NDArray[np.float64], directions: NDArray[np.float64]) -> tuple[Array, NDArray[np.int16]]:
    """Find where rays from one point outside a solid enter it.

    Args:
        origin: float64 [3]; directions: float64 [3, N]; both in the solid's unit coordinates.

    Returns:
        enter: float32 [N], ray parameter of the first surface met, inf for a miss.
        face: int16 [N], part * FACES_PER_PART + face within the part.
    """
    best, best_leave, best_face = _intersect_part(shape.parts[0], origin, directions)
    best = np.where(best < best_leave, best, np.inf)
    for number, part in enumerate(shape.parts[1:], start=1):
        enter, leave, face = _intersect_part(part, origin, directions)
        closer = (enter < leave) & (enter < best)
        np.copyto(best, enter, where=closer)
        np.copyto(best_face, face + np.int16(number * FACES_PER_PART), where=closer)
    return best.astype(np.float32), best_face


def _intersect_part(
    part: Part, origin: NDArray[np.float64], d: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int16]]:
    """Find where rays enter and leave a part, float64 [N] each (a miss: enter >= leave), and the face entered, int16 [N]."""
    if part.quadric is None:
        enter, leave = np.zeros(d.shape[1]), np.full(d.shape[1], np.inf)
    else:
        enter, leave = _intersect_quadric(part.quadric, origin, d)
        np.maximum(enter, 0, out=enter)
    face = np.full(d.shape[1], QUADRIC_FACE, np.int16)
    reach, toward = part.offsets - part.normals @ origin, part.normals @ d
    (outside,) = (reach < 0).nonzero()
    if outside.size < reach.size:  # rays leave through the planes whose inner side holds the origin, or (t huge) never
        inside = reach >= 0
        np.minimum(leave, (reach[inside, None] / np.maximum(toward[inside], _TINY)).min(0), out=leave)
    for plane in outside:  # rays enter through the others, or (t huge) never
        t = reach[plane] / np.minimum(toward[plane], -_TINY)
        np.copyto(face, np.int16(plane), where=t > enter)
        np.maximum(enter, t, out=enter)
    return enter, leave, face


def _intersect_quadric(
    quadric: Quadric, o: NDArray[np.float64], d: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The interval of t on which a t^2 + 2 b t + c <= 0; of a double cone, the lower nappe's. A miss: (inf, -inf)."""
    a = quadric.squares @ (d * d)
    b = (quadric.squares * o + quadric.linear / 2) @ d
    c = float(quadric.squares @ (o * o) + quadric.linear @ o + quadric.constant)
    a[np.abs(a) < _TINY] = _TINY
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0)) / np.abs(a)
    middle = -b / a
    low, high = middle - root, middle + root
    if (
        quadric.squares[1] < 0
    ):  # a steep ray (a < 0) is inside a cone beyond the roots: after the apex going down, else before it
        steep, down = a < 0, d[1] < 0
        beyond = np.where(down, high, -np.inf), np.where(down, np.inf, low)
        low, high = np.where(steep, beyond[0], low), np.where(steep, beyond[1], high)
    missed = discriminant <= 0
    low[missed], high[missed] = np.inf, -np.inf
    return low, high


def surface_normals(shape: Shape, points: Array, faces: NDArray[np.int16]) -> Array:
    """Outward normals (not of unit length) float32 [3, N] in unit coordinates at surface points [3, N] on the given faces."""
    normals = shape.plane_normals[faces].T
    for number, part in enumerate(shape.parts):
        if part.quadric is not None:
            curved = faces == number * FACES_PER_PART + QUADRIC_FACE
            gradient = 2 * part.quadric.squares[:, None] * points + part.quadric.linear[:, None]
            normals = np.where(curved, gradient.astype(np.float32), normals)
    return normals
