"""Exact normals and segments of the scenes of a synthetic data set, traced again on demand.

Scenes follow from (seed, split, index), so the files of a set need not hold what can be computed from them.
"""

import json
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.synthesis.dataset import DESCRIPTION, GENERATOR_VERSION
from data_tools.synthesis.generation import VARIETIES, make_scene
from data_tools.synthesis.layouts import FRAMES_PER_FOLDER, TASKS
from data_tools.synthesis.lighting import body_normals
from data_tools.synthesis.scenes import Scene
from data_tools.synthesis.shapes import CLASS_NAMES, Array
from data_tools.synthesis.tracing import CEILING, FLOOR, ROOM, Hits, pixel_centres, trace
from dpt.errors import UserError

SEGMENTS = ("floor", "ceiling", "wall", *CLASS_NAMES)
"""Kinds of surface that a pixel may show, in the order of the channels."""
_HYPERSIM_KEY = re.compile(r"ai_(\d{3})_(\d{3})/rgb_cam_00_fr(\d{4})")


class SceneGeometry:
    """Maps of the first frames of a synthetic set, by the keys of one of its layouts. UserError if `root` holds none."""

    def __init__(self, root: Path, dataset: str) -> None:
        path = root.resolve().parent / DESCRIPTION
        try:
            self._description = json.loads(path.read_text(encoding="utf-8"))
            version = self._description["generator_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{root}: no synthetic scenes lie there ({path} cannot be read), and only they have exact normals and "
                "segments; give --features a folder of .npy files."
            ) from error
        if dataset not in TASKS.values():
            raise UserError(f"{root}: synthetic scenes are no {dataset}; take {', '.join(TASKS.values())} as --dataset.")
        if version != GENERATOR_VERSION:
            raise UserError(
                f"{path} is of version {version} of the scenes, {GENERATOR_VERSION} is made here; synthesise the set again."
            )
        self.size = int(self._description["size"])
        self._hypersim = dataset == TASKS["depth"]

    def normals(self, key: str) -> Array:
        """Unit normals float32 [3, H, W] in the camera's axes: right, down, forward."""
        scene = self._scene(key)
        camera = scene.cameras[0]
        hits, points = self._seen(scene)
        inward = np.zeros_like(points)  # of the room: face 2 * axis + side looks back from that side
        axis, side = np.divmod(hits.face, 2)
        room = hits.body == ROOM
        inward[axis[room], room.nonzero()[0]] = 1 - 2 * side[room].astype(np.float32)
        normals = scene.room.to_local.T @ inward
        for number, solid in enumerate(scene.solids(0)):
            (mine,) = (hits.body == number).nonzero()
            local = solid.to_local @ (points.take(mine, axis=1) - solid.centre)
            normals[:, mine] = body_normals(solid, local, hits.face[mine])
        return (camera.axes() @ normals).reshape(3, self.size, self.size)

    def segments(self, key: str) -> Array:
        """float32 [len(SEGMENTS), H, W]: 1 where a pixel shows that kind of surface, else 0."""
        scene = self._scene(key)
        hits, _ = self._seen(scene)
        names = np.array([SEGMENTS.index(body.class_name) for body in scene.bodies])
        surface = np.where(hits.face == FLOOR, 0, np.where(hits.face == CEILING, 1, 2))
        kind: NDArray[np.intp] = np.where(hits.body == ROOM, surface, names[hits.body])
        shown = np.arange(len(SEGMENTS))[:, None] == kind
        return shown.astype(np.float32).reshape(-1, self.size, self.size)

    def _seen(self, scene: Scene) -> tuple[Hits, Array]:
        """First hit of each pixel's ray, and its point: float32 [3, N]."""
        camera = scene.cameras[0]
        origin: Array = np.array(camera.position, np.float32)[:, None]
        directions = camera.rays(self.size, *pixel_centres(self.size))
        hits = trace(scene.solids(0), scene.room, origin, directions)
        return hits, origin + directions * hits.t

    def _scene(self, key: str) -> Scene:
        """The scene behind a sample's key."""
        index = self._number(key)
        for split, count in self._description["counts"].items():
            if index < count:
                variety = VARIETIES[self._description.get("variety", "standard")]
                return make_scene(self._description["seed"], split, index, variety)
            index -= count
        raise UserError(f"{key}: {DESCRIPTION} names no such scene; synthesise the set again.")

    def _number(self, key: str) -> int:
        """Number of the scene, from 0 on over all splits (`data_tools.synthesis.layouts`)."""
        if not self._hypersim:
            return int(key.rpartition("/")[2]) - 1
        found = _HYPERSIM_KEY.fullmatch(key)
        assert found is not None, key
        volume, folder, frame = map(int, found.groups())
        return (volume * 1000 + folder) * FRAMES_PER_FOLDER + frame
