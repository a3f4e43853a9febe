"""Rays against a scene's bodies and room, all in numpy arrays of rays.

World axes: x right, y up, z forward (metres, y = 0 on the floor). A camera ray is o + t d with d's forward component 1, so its
parameter t is the depth to the image plane.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from data_tools.synthesis.shapes import SHAPES, Array, intersect

ROOM = -1
"""Body number of the room itself."""
FLOOR, CEILING = 2, 3
"""Face numbers of the room (2 * axis + side); 0, 1, 4 and 5 are walls."""


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Position and heading of a thing in one frame; a positive yaw turns right, seen from above."""

    position: tuple[float, float, float]
    yaw: float


def turning(yaw: float) -> Array:
    """The rotation float32 [3, 3] about the vertical."""
    s, c = np.sin(yaw), np.cos(yaw)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], np.float32)


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera: `yaw` turns right, `pitch` looks down, radians; square pixels, centre in the middle."""

    position: tuple[float, float, float]
    yaw: float
    pitch: float
    field_of_view: float

    def focal(self, size: int) -> float:
        """Focal length in pixels of a size x size image."""
        return 0.5 * size / float(np.tan(0.5 * self.field_of_view))

    def axes(self) -> Array:
        """Rows: the camera's right, down and forward directions in the world, float32 [3, 3]."""
        sy, cy, sp, cp = np.sin(self.yaw), np.cos(self.yaw), np.sin(self.pitch), np.cos(self.pitch)
        return np.array([[cy, 0, -sy], [-sy * sp, -cp, -cy * sp], [sy * cp, -sp, cy * cp]], np.float32)

    def rays(self, size: int, columns: Array, rows: Array) -> Array:
        """Directions float32 [3, N] through image points in pixels (pixel i's centre is i + 0.5)."""
        scale, half = np.float32(1 / self.focal(size)), np.float32(0.5 * size)
        return self.axes().T @ np.stack([(columns - half) * scale, (rows - half) * scale, np.ones_like(columns)])

    def project(self, size: int, points: Array) -> tuple[Array, Array]:
        """Image points (columns, rows), pixels, of world points float32 [3, N]."""
        x, y, z = self.axes() @ (points - np.array(self.position, np.float32)[:, None])
        scale, half = np.float32(self.focal(size)), np.float32(0.5 * size)
        return scale * x / z + half, scale * y / z + half


@lru_cache(maxsize=4)
def pixel_centres(size: int) -> tuple[Array, Array]:
    """Columns and rows, float32 [size * size], of all pixel centres in raster order."""
    side = np.arange(size, dtype=np.float32) + np.float32(0.5)
    columns, rows = np.meshgrid(side, side)
    return columns.ravel(), rows.ravel()


@dataclass(frozen=True, kw_only=True)
class Solid:
    """A body in one frame."""

    shape: str
    scale: tuple[float, float, float]
    """Half extents in metres."""
    pose: Pose

    @cached_property
    def centre(self) -> Array:
        """Centre in the world, float32 [3, 1]."""
        return np.array(self.pose.position, np.float32)[:, None]

    @cached_property
    def to_local(self) -> Array:
        """Rotation float32 [3, 3] from world to metric body axes."""
        return turning(-self.pose.yaw)

    @cached_property
    def _to_unit(self) -> NDArray[np.float64]:
        return self.to_local.astype(np.float64) / np.array(self.scale)[:, None]

    @cached_property
    def _reach(self) -> float:
        """Radius of a ball about the centre that holds the body."""
        sx, sy, sz = self.scale
        corners = SHAPES[self.shape].corners
        return max(self.scale) if corners == "none" else math.hypot(sx, sy) if corners == "rim" else math.hypot(sx, sy, sz)

    def meet(self, origin: Array, directions: Array, lengths2: Array) -> tuple[NDArray[np.intp], Array, NDArray[np.int16]]:
        """Rays from one point outside that may hit: their indices, where they enter (inf: a miss) and the face met.

        Args:
            origin: float32 [3, 1]; directions: float32 [3, N]; lengths2: float32 [N], squared lengths of directions.
        """
        offset = (self.centre - origin)[:, 0]
        along = offset @ directions
        tangent2 = np.float32(offset @ offset - 1.001 * self._reach**2)
        (near,) = (along * np.abs(along) > tangent2 * lengths2).nonzero()
        enter, face = intersect(SHAPES[self.shape], self._to_unit @ -offset, self._to_unit @ directions.take(near, axis=1))
        return near, enter, face


@dataclass(frozen=True, kw_only=True)
class Room:
    """A box around the scene, turned by `yaw`."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    yaw: float

    @cached_property
    def to_local(self) -> Array:
        """Rotation float32 [3, 3] from world to the room's axes."""
        return turning(-self.yaw)

    def meet(self, origin: Array, directions: Array) -> tuple[Array, NDArray[np.int16]]:
        """Find where rays from one point inside reach the walls: t float32 [N], face int16 [N] (2 * axis + side)."""
        low, high = (np.array(side, np.float32)[:, None] for side in (self.low, self.high))
        d = self.to_local @ directions
        d[d == 0] = 1e-9
        x, y, z = (np.copysign((high - low) / 2, d) + ((high + low) / 2 - self.to_local @ origin)) / d
        t = np.minimum(np.minimum(x, y), z)
        axis = np.where(t == x, np.int16(0), np.where(t == y, np.int16(1), np.int16(2)))
        ahead = np.choose(axis, d > 0)
        return t, 2 * axis + ahead


@dataclass(frozen=True, kw_only=True)
class Hits:
    """First surfaces met by N rays."""

    t: Array
    body: NDArray[np.int8]
    """Body number, or ROOM."""
    face: NDArray[np.int16]


def trace(solids: list[Solid], room: Room, origin: Array, directions: Array) -> Hits:
    """First hits of rays float32 [3, N] from one point [3, 1]."""
    t, face = room.meet(origin, directions)
    body = np.full(t.shape, ROOM, np.int8)
    lengths2 = np.einsum("in,in->n", directions, directions)
    for number, solid in enumerate(solids):
        near, enter, met = solid.meet(origin, directions, lengths2)
        (closer,) = (enter < t[near]).nonzero()
        near = near[closer]
        t[near], body[near], face[near] = enter[closer], number, met[closer]
    return Hits(t=t, body=body, face=face)


def lit(solids: list[Solid], lamp: Array, points: Array) -> NDArray[np.bool_]:
    """Whether the lamp at [3, 1] sees each surface point of float32 [3, N]; a body's far side is in its own shadow."""
    directions = points - lamp
    lengths2 = np.einsum("in,in->n", directions, directions)
    seen = np.ones(points.shape[1], np.bool_)
    for solid in solids:
        near, enter, _ = solid.meet(lamp, directions, lengths2)
        seen[near[enter < 0.999]] = False
    return seen
