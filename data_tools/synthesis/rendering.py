"""Pictures of a scene and their exact ground truth.

Pixel (row i, column j) looks through the image point (j + 0.5, i + 0.5). Ground truth is that of the pixel's centre; edges in
the pictures are softened.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_tools.synthesis.lighting import SceneLight, put_columns, shade_body, shade_room, smooth_within, squared_length
from data_tools.synthesis.scenes import Scene
from data_tools.synthesis.shapes import Array
from data_tools.synthesis.tracing import ROOM, Hits, lit, pixel_centres, trace, turning

TARGET = 1
"""Number of the body whose whole shape is the amodal truth."""


@dataclass(frozen=True, kw_only=True)
class SceneTruth:
    """Two pictures and all ground truths of one scene, H = W = size."""

    image: NDArray[np.uint8]
    """uint8 [H, W, 3]."""
    next_image: NDArray[np.uint8]
    """uint8 [H, W, 3], the second frame."""
    label: int
    class_name: str
    depth: Array
    """float32 [H, W], metres along the camera's axis (distance to plane)."""
    flow: Array
    """float32 [2, H, W], pixels (u right, v down) that each visible surface point moves by until the second frame."""
    visible_mask: NDArray[np.bool_]
    """bool [H, W], where the target is seen."""
    whole_mask: NDArray[np.bool_]
    """bool [H, W], where it would be seen if nothing stood in front of it."""
    whole: NDArray[np.uint8]
    """uint8 [H, W, 3], the whole target alone on white."""


def render(scene: Scene, size: int) -> SceneTruth:
    """Render both frames and every ground truth at size x size pixels."""
    first, second = _Frame(scene, 0, size), _Frame(scene, 1, size)
    near, t, face = first.solids[TARGET].meet(first.origin, first.directions, squared_length(first.directions))
    hit = t < np.inf
    pixels = near[hit]
    whole_mask = np.zeros(size * size, np.bool_)
    whole_mask[pixels] = True
    return SceneTruth(
        image=first.picture(),
        next_image=second.picture(),
        label=scene.label,
        class_name=scene.class_name,
        depth=first.hits.t.reshape(size, size),
        flow=_flow(first, second),
        visible_mask=(first.hits.body == TARGET).reshape(size, size),
        whole_mask=whole_mask.reshape(size, size),
        whole=_alone_on_white(first, pixels, t[hit], face[hit]),
    )


class _Frame:
    """One frame of a scene at one size, traced through its pixel centres."""

    def __init__(self, scene: Scene, number: int, size: int) -> None:
        self.scene, self.size = scene, size
        self.blur = max(1, size // 64)
        self.camera = scene.cameras[number]
        self.solids = scene.solids(number)
        self.light = SceneLight(scene, self.solids, self.camera.focal(size))
        self.origin: Array = np.array(self.camera.position, np.float32)[:, None]
        self.directions = self.camera.rays(size, *pixel_centres(size))
        self.hits = trace(self.solids, scene.room, self.origin, self.directions)
        self.points = self.origin + self.directions * self.hits.t
        self.lamplight = self._lamplight()

    def picture(self) -> NDArray[np.uint8]:
        """uint8 [H, W, 3]."""
        colors = self._shade()
        soften_edges(colors, self.hits, self.size)
        return to_bytes(colors).reshape(self.size, self.size, 3)

    def _lamplight(self) -> Array:
        """Share of the lamp that each pixel's surface sees, float32 [N] in [0, 1], smoothed separately for room and bodies."""
        seen = lit(self.solids, self.light.lamp, self.points)
        in_room = self.hits.body == ROOM
        room, bodies = (smooth_within(seen, mask, self.size, self.blur) for mask in (in_room, ~in_room))
        return np.where(in_room, room, bodies)

    def _shade(self) -> Array:
        """Linear colours float32 [3, N] of the surfaces met."""
        colors = np.empty_like(self.points)
        for number in range(ROOM, len(self.solids)):
            (mine,) = (self.hits.body == number).nonzero()
            if mine.size == 0:
                continue
            points, t, face = self.points.take(mine, axis=1), self.hits.t[mine], self.hits.face[mine]
            if number == ROOM:
                shades = shade_room(self.light, points, face, t, self.lamplight[mine])
            else:
                rays = self.directions.take(mine, axis=1)
                shades = shade_body(self.light, number, points, face, t, self.lamplight[mine], rays)
            put_columns(colors, mine, shades)
        return colors


def to_bytes(colors: Array) -> NDArray[np.uint8]:
    """Linear colours float32 [3, N] to display bytes [N, 3], gamma 2."""
    shown = np.sqrt(np.clip(colors, 0, 1))
    return np.ascontiguousarray((shown * np.float32(255) + np.float32(0.5)).astype(np.uint8).T)


def _flow(first: _Frame, second: _Frame) -> Array:
    """Flow of the surface point seen by each pixel: moved with its body, then projected by the second camera."""
    moved = first.points.copy()
    for number, (before, after) in enumerate(zip(first.solids, second.solids, strict=True)):
        (mine,) = (first.hits.body == number).nonzero()
        turned = turning(after.pose.yaw - before.pose.yaw) @ (moved.take(mine, axis=1) - before.centre)
        put_columns(moved, mine, after.centre + turned)
    places = np.stack(second.camera.project(first.size, moved)) - np.stack(pixel_centres(first.size))
    return places.reshape(2, first.size, first.size)


def _alone_on_white(frame: _Frame, pixels: NDArray[np.intp], t: Array, face: NDArray[np.int16]) -> NDArray[np.uint8]:
    """The target, met by the rays of `pixels` at depths `t`, lit as in the scene, on white."""
    rays = frame.directions.take(pixels, axis=1)
    points = frame.origin + rays * t
    sunlit, mask = np.zeros((2, frame.size * frame.size), np.bool_)
    sunlit[pixels], mask[pixels] = lit(frame.solids, frame.light.lamp, points), True
    in_view = frame.hits.body == TARGET  # there the light is that of the picture
    soft = np.where(in_view, frame.lamplight, smooth_within(sunlit, mask, frame.size, frame.blur))
    picture = np.full((frame.size * frame.size, 3), 255, np.uint8)
    picture[pixels] = to_bytes(shade_body(frame.light, TARGET, points, face, t, soft[pixels], rays))
    return picture.reshape(frame.size, frame.size, 3)


def soften_edges(colors: Array, hits: Hits, size: int) -> None:
    """Smooth linear colours [3, N] in place, by (1 2 1) x (1 2 1) / 16, where a neighbour shows another surface."""
    surface = (hits.face + (hits.body.astype(np.int16) + 1) * 256).reshape(size, size)
    edge = np.zeros((size, size), np.bool_)
    across, down = surface[:, 1:] != surface[:, :-1], surface[1:] != surface[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    (pixels,) = edge.ravel().nonzero()
    row, column = np.divmod(pixels, size)
    left, right = pixels - (column > 0), pixels + (column < size - 1)
    up, below = -size * (row > 0), size * (row < size - 1)
    weighted = [(pixels, 4), (left, 2), (right, 2), (pixels + up, 2), (pixels + below, 2)]
    weighted += [(left + up, 1), (right + up, 1), (left + below, 1), (right + below, 1)]
    softened = np.zeros((3, pixels.size), np.float32)
    for index, weight in weighted:
        softened += colors.take(index, axis=1) * np.float32(weight / 16)
    put_columns(colors, pixels, softened)
