"""Contents of a synthetic scene: a furnished room, seen in two frames."""

from dataclasses import dataclass
from typing import Literal

from data_tools.synthesis.shapes import CLASS_NAMES
from data_tools.synthesis.tracing import Camera, Pose, Room, Solid

Vector = tuple[float, float, float]
Color = tuple[float, float, float]
"""Linear red, green and blue."""
Pattern = Literal["plain", "stripes", "checker", "noise"]
PATTERNS: tuple[Pattern, ...] = ("stripes", "checker", "noise")


@dataclass(frozen=True, kw_only=True)
class Texture:
    """A solid texture: two linear colours mixed by a smooth wave in the body's own metric axes."""

    kind: Pattern
    colors: tuple[Color, Color]
    waves: tuple[Vector, ...]
    """Wave vectors, cycles per metre."""
    phases: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Body:
    """An object and its motion."""

    class_name: str
    scale: Vector
    """Half extents, metres."""
    poses: tuple[Pose, Pose]

    def solid(self, frame: int) -> Solid:
        return Solid(shape=self.class_name, scale=self.scale, pose=self.poses[frame])


@dataclass(frozen=True, kw_only=True)
class Look:
    """Appearance of an object's surface."""

    texture: Texture
    gloss: float
    """Strength of its highlight."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Two frames of a scene. Body 0 gives the class; body 1 is the occluded one of the amodal task."""

    seed: int
    split: str
    index: int
    room: Room
    surfaces: tuple[Texture, Texture, Texture]
    """Floor, ceiling, walls."""
    lamp: Vector
    warmth: Color
    bodies: tuple[Body, ...]
    looks: tuple[Look, ...]
    """One per body."""
    cameras: tuple[Camera, Camera]

    @property
    def class_name(self) -> str:
        return self.bodies[0].class_name

    @property
    def label(self) -> int:
        return CLASS_NAMES.index(self.class_name)

    def solids(self, frame: int) -> list[Solid]:
        return [body.solid(frame) for body in self.bodies]
