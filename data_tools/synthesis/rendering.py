"""Pictures of a scene and their exact ground truth.

Pixel (row i, column j) looks through the image point (j + 0.5, i + 0.5). Ground truth is that of the pixel's centre; the colours
of pixels on edges are averages over four rays.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_tools.synthesis.lighting import SceneLight, shade_body, shade_room, smooth_within
from data_tools.synthesis.scenes import Scene
from data_tools.synthesis.shapes import Array
from data_tools.synthesis.tracing import ROOM, Hits, lit, pixel_centres, trace, turning

TARGET = 1
"""Number of the body whose whole shape is the amodal truth."""
_SUBPIXELS = np.array([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]], np.float32)[:, :, None]


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
    """bool [H, W], where it would be seen if nothing stood before it."""
    whole: NDArray[np.uint8]
    """uint8 [H, W, 3], the whole target alone on white."""

    @property
    def occlusion(self) -> NDArray[np.uint8]:
        """The picture in which the target is partly hidden."""
        return self.image


def render(scene: Scene, size: int) -> SceneTruth:
    """Render both frames and every ground truth at size x size pixels."""
    first, second = _Frame(scene, 0, size), _Frame(scene, 1, size)
    target = trace([first.solids[TARGET]], scene.room, first.origin, first.directions)
    whole_mask = target.body == 0
    return SceneTruth(
        image=first.picture(),
        next_image=second.picture(),
        label=scene.label,
        class_name=scene.class_name,
        depth=first.hits.t.reshape(size, size),
        flow=_flow(first, second),
        visible_mask=(first.hits.body == TARGET).reshape(size, size),
        whole_mask=whole_mask.reshape(size, size),
        whole=_alone_on_white(first, target, whole_mask),
    )


class _Frame:
    """One frame of a scene at one size, traced through its pixel centres."""

    def __init__(self, scene: Scene, number: int, size: int) -> None:
        self.scene, self.size = scene, size
        self.camera = scene.cameras[number]
        self.solids = scene.solids(number)
        self.light = SceneLight(scene, self.solids, self.camera.focal(size))
        self.origin: Array = np.array(self.camera.position, np.float32)[:, None]
        self.columns, self.rows = pixel_centres(size)
        self.directions = self.camera.rays(size, self.columns, self.rows)
        self.hits = trace(self.solids, scene.room, self.origin, self.directions)
        self.points = self.origin + self.directions * self.hits.t

    def picture(self) -> NDArray[np.uint8]:
        """uint8 [H, W, 3]: every pixel shaded once, those on edges again through four rays."""
        sunlit = lit(self.solids, self.light.lamp, self.points)
        in_room = self.hits.body == ROOM
        radius = max(1, self.size // 64)
        room_lit = smooth_within(sunlit, in_room, self.size, radius)
        body_lit = smooth_within(sunlit, ~in_room, self.size, radius)
        colors = self._shade(self.hits, self.directions, room_lit, body_lit)
        edges = _edges(self.hits, self.size)
        columns, rows = (
            (grid[edges] + offset).ravel() for grid, offset in zip((self.columns, self.rows), _offsets(), strict=True)
        )
        directions = self.camera.rays(self.size, columns, rows)
        fine = trace(self.solids, self.scene.room, self.origin, directions)
        count = len(_SUBPIXELS)
        samples = self._shade(fine, directions, np.tile(room_lit[edges], count), np.tile(body_lit[edges], count))
        colors[:, edges] = samples.reshape(3, count, -1).mean(1)
        return to_bytes(colors).reshape(self.size, self.size, 3)

    def _shade(self, hits: Hits, directions: Array, room_lit: Array, body_lit: Array) -> Array:
        """Linear colours float32 [3, N] of the surfaces met; the lamp's visibility float32 [N] is apart for room and bodies."""
        colors = np.empty_like(directions)
        for number in range(ROOM, len(self.solids)):
            mine = np.flatnonzero(hits.body == number)
            if mine.size == 0:
                continue
            rays, t, face = directions.take(mine, axis=1), hits.t[mine], hits.face[mine]
            points = self.origin + rays * t
            if number == ROOM:
                colors[:, mine] = shade_room(self.light, points, face, t, room_lit[mine])
            else:
                colors[:, mine] = shade_body(self.light, number, points, face, t, body_lit[mine], rays)
        return colors


def to_bytes(colors: Array) -> NDArray[np.uint8]:
    """Linear colours float32 [3, N] to display bytes [N, 3], gamma 2."""
    shown = np.sqrt(np.clip(colors, 0, 1))
    return np.ascontiguousarray((shown * np.float32(255) + np.float32(0.5)).astype(np.uint8).T)


def _offsets() -> tuple[Array, Array]:
    return _SUBPIXELS[:, 0], _SUBPIXELS[:, 1]


def _flow(first: _Frame, second: _Frame) -> Array:
    """Where the surface point seen by each pixel goes: moved with its body, then projected by the second camera."""
    moved = first.points.copy()
    for number, (before, after) in enumerate(zip(first.solids, second.solids, strict=True)):
        mine = np.flatnonzero(first.hits.body == number)
        moved[:, mine] = after.centre + turning(after.pose.yaw - before.pose.yaw) @ (moved[:, mine] - before.centre)
    columns, rows = second.camera.project(first.size, moved)
    return np.stack([columns - first.columns, rows - first.rows]).reshape(2, first.size, first.size)


def _alone_on_white(frame: _Frame, target: Hits, whole_mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The target's own pixels, lit as in the scene, on white."""
    pixels = np.flatnonzero(whole_mask)
    rays, t = frame.directions.take(pixels, axis=1), target.t[pixels]
    points = frame.origin + rays * t
    sunlit = np.zeros(whole_mask.shape, np.bool_)
    sunlit[pixels] = lit(frame.solids, frame.light.lamp, points)
    soft = smooth_within(sunlit, whole_mask, frame.size, max(1, frame.size // 64))
    picture = np.full((frame.size * frame.size, 3), 255, np.uint8)
    picture[pixels] = to_bytes(shade_body(frame.light, TARGET, points, target.face[pixels], t, soft[pixels], rays))
    return picture.reshape(frame.size, frame.size, 3)


def _edges(hits: Hits, size: int) -> NDArray[np.intp]:
    """Pixels beside (or above) one that shows another surface."""
    surface = (hits.face + (hits.body.astype(np.int16) + 1) * 256).reshape(size, size)
    edge = np.zeros((size, size), np.bool_)
    across, down = surface[:, 1:] != surface[:, :-1], surface[1:] != surface[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return np.flatnonzero(edge)
