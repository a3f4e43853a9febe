"""Generate a scene from (seed, split, index), within the ranges of a variety."""

import math
from dataclasses import dataclass

import numpy as np

from data_tools.synthesis.scenes import PATTERNS, Body, Color, Look, Pattern, Scene, Texture, Vector
from data_tools.synthesis.shapes import CLASS_NAMES, SHAPES, Array
from data_tools.synthesis.tracing import Camera, Pose, Room, pixel_centres, trace
from dpt.errors import UserError

SPLITS: tuple[str, ...] = ("train", "val", "test")
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Variety:
    """The ranges that a scene is drawn from; lengths in metres, angles in radians unless said otherwise."""

    room_side: Range = (2.8, 4.2)
    """Distance from the camera to a side wall."""
    room_length: Range = (6.0, 10.5)
    room_yaw: float = 0.35
    camera_height: Range = (1.35, 1.75)
    camera_yaw: float = 0.06
    camera_pitch: Range = (0.17, 0.29)
    field_of_view: Range = (60.0, 60.0)
    """Field of view in degrees."""
    more_bodies: tuple[int, int] = (1, 5)
    """Bodies tried besides the two that every scene has; the upper end is excluded."""
    body_saturation: tuple[Range, Range] = ((0.55, 0.95), (0.25, 0.9))
    """Saturation of the two colours of a body."""
    body_value: tuple[Range, Range] = ((0.35, 0.85), (0.3, 0.85))
    body_wavelength: Range = (0.3, 0.7)
    floor_saturation: Range = (0.1, 0.5)
    floor_value: Range = (0.45, 0.75)
    wall_saturation: Range = (0.08, 0.35)
    wall_value: Range = (0.6, 0.88)
    surface_wavelength: tuple[Range, Range] = ((0.9, 1.5), (0.9, 1.8))
    """Wavelengths of the floor's texture and of the walls'."""


VARIETIES: dict[str, Variety] = {
    "standard": Variety(),
    "rich": Variety(
        room_side=(1.9, 6.0),
        room_length=(5.0, 14.0),
        room_yaw=0.7,
        camera_height=(1.1, 2.1),
        camera_yaw=0.15,
        camera_pitch=(0.08, 0.38),
        field_of_view=(50.0, 75.0),
        more_bodies=(1, 10),
        body_saturation=((0.1, 1.0), (0.05, 1.0)),
        body_value=((0.15, 0.95), (0.15, 0.95)),
        body_wavelength=(0.12, 1.0),
        floor_saturation=(0.0, 0.8),
        floor_value=(0.2, 0.9),
        wall_saturation=(0.0, 0.8),
        wall_value=(0.25, 0.95),
        surface_wavelength=((0.4, 2.5), (0.4, 3.0)),
    ),
}
"""Varieties by name: the one behind all figures of the documentation, and a wider one that contains it, for pre-training."""

_CHECK_SIZE = 32
"""Side in pixels of the picture that checks how much of the bodies is visible."""
_ATTEMPTS = 200
_BODY_AXES: tuple[Vector, ...] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
_FLOOR_AXES: tuple[Vector, ...] = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
_WALL_AXES: tuple[Vector, ...] = ((0.0, 1.0, 0.0), (1.0, 0.0, 1.0))


def make_scene(seed: int, split: str, index: int, variety: Variety = VARIETIES["standard"]) -> Scene:
    """Scene `index` of a split; the same four always give the same scene.

    Raises:
        UserError: an unknown split or a negative seed or index.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    if seed < 0 or index < 0:
        raise UserError(f"seed {seed} and index {index} cannot be negative.")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    class_name = CLASS_NAMES[rng.integers(len(CLASS_NAMES))]  # outside the loop: rejection must not favour any class
    for _ in range(_ATTEMPTS):
        room, cameras = _room(rng, variety), _cameras(rng, variety)
        bodies = _bodies(rng, class_name, room, variety)
        if bodies is not None and _is_clear(bodies, room, cameras[0]):
            break
    else:
        raise AssertionError(f"no acceptable scene for seed {seed}, split {split}, index {index}")
    return Scene(
        seed=seed,
        split=split,
        index=index,
        room=room,
        surfaces=_surfaces(rng, variety),
        lamp=(rng.uniform(-1.6, 1.6), room.high[1] - 0.15, rng.uniform(0.6, 2.6)),
        warmth=(1.0, rng.uniform(0.9, 1.0), rng.uniform(0.78, 1.0)),
        bodies=bodies,
        looks=tuple(_look(rng, variety) for _ in bodies),
        cameras=cameras,
    )


def _room(rng: np.random.Generator, variety: Variety) -> Room:
    return Room(
        low=(-rng.uniform(*variety.room_side), 0.0, -3.0),
        high=(rng.uniform(*variety.room_side), rng.uniform(2.7, 3.4), rng.uniform(*variety.room_length)),
        yaw=rng.uniform(-variety.room_yaw, variety.room_yaw),
    )


def _cameras(rng: np.random.Generator, variety: Variety) -> tuple[Camera, Camera]:
    height, yaw = rng.uniform(*variety.camera_height), rng.uniform(-variety.camera_yaw, variety.camera_yaw)
    pitch, (narrow, wide) = rng.uniform(*variety.camera_pitch), variety.field_of_view
    view = float(np.deg2rad(narrow if narrow == wide else rng.uniform(narrow, wide)))
    x, y, z = rng.uniform(-0.08, 0.08), rng.uniform(-0.05, 0.05), rng.uniform(-0.1, 0.16)
    first = Camera(position=(0.0, height, 0.0), yaw=yaw, pitch=pitch, field_of_view=view)
    second = Camera(
        position=(x, height + y, z),
        yaw=yaw + rng.uniform(-0.03, 0.03),
        pitch=pitch + rng.uniform(-0.015, 0.015),
        field_of_view=view,
    )
    return first, second


def _bodies(rng: np.random.Generator, class_name: str, room: Room, variety: Variety) -> tuple[Body, ...] | None:
    """The main body, the one it partly hides, and some more that stand clear of both; None when they do not fit."""
    others = [name for name in CLASS_NAMES if name != class_name]
    main_z, main_angle = rng.uniform(2.5, 3.3), rng.uniform(-0.22, 0.22)
    main = _body(rng, class_name, rng.uniform(0.5, 0.66), main_angle * main_z, main_z)
    target_z, side = main_z + rng.uniform(0.9, 2.0), (-1, 1)[rng.integers(2)]
    target_height = rng.uniform(0.5, 0.75)
    spread = SHAPES[class_name].fill * main.scale[0] / main_z + 0.8 * target_height / target_z
    target_angle = main_angle + side * rng.uniform(0.3, 0.8) * spread
    bodies = [main, _body(rng, others[rng.integers(len(others))], target_height, target_angle * target_z, target_z)]
    for _ in range(rng.integers(*variety.more_bodies)):
        for _ in range(6):
            z = rng.uniform(2.6, min(7.5, room.high[2] - 0.5))
            body = _body(rng, others[rng.integers(len(others))], rng.uniform(0.25, 0.6), rng.uniform(-0.6, 0.6) * z, z)
            if all(_stands_free(body, other) for other in bodies) and not _hides(body, bodies[:2]) and _is_inside(body, room):
                bodies.append(body)
                break
    fits = _stands_free(bodies[0], bodies[1]) and all(_is_inside(body, room) for body in bodies[:2])
    return tuple(bodies) if fits and len(bodies) >= 3 else None


def _body(rng: np.random.Generator, class_name: str, half_height: float, x: float, z: float) -> Body:
    shape = SHAPES[class_name]
    half_height *= shape.height
    sx = half_height * rng.uniform(*shape.width)
    sz = sx if shape.square_base else half_height * rng.uniform(*shape.width)
    yaw = rng.uniform(-np.pi, np.pi)
    moving = float(rng.random() > 0.35)
    dx, dz, turning = (moving * rng.uniform(-reach, reach) for reach in (0.2, 0.2, 0.25))
    poses = (Pose(position=(x, half_height, z), yaw=yaw), Pose(position=(x + dx, half_height, z + dz), yaw=yaw + turning))
    return Body(class_name=class_name, scale=(sx, half_height, sz), poses=poses)


def _radius(body: Body) -> float:
    sx, _, sz = body.scale
    return max(sx, sz) if body.class_name not in ("box", "table") else math.hypot(sx, sz)


def _stands_free(body: Body, other: Body) -> bool:
    """Whether two bodies' round footprints keep apart in both frames."""
    apart = _radius(body) + _radius(other) + 0.05
    return all(
        math.hypot(a.position[0] - b.position[0], a.position[2] - b.position[2]) > apart
        for a, b in zip(body.poses, other.poses, strict=True)
    )


def _hides(body: Body, others: list[Body]) -> bool:
    """Whether a body stands before one of the others, as seen from the camera."""
    x, _, z = body.poses[0].position
    for other in others:
        ox, _, oz = other.poses[0].position
        if z < oz + 0.3 and abs(x / z - ox / oz) < 1.1 * (_radius(body) / z + _radius(other) / oz):
            return True
    return False


def _is_inside(body: Body, room: Room) -> bool:
    margin, turn = _radius(body) + 0.05, room.to_local
    places = [turn @ pose.position for pose in body.poses]
    return all(room.low[i] + margin < place[i] < room.high[i] - margin for place in places for i in (0, 2))


def _is_clear(bodies: tuple[Body, ...], room: Room, camera: Camera) -> bool:
    """Whether the main body is the largest in view and the target is partly, not wholly, hidden."""
    directions = camera.rays(_CHECK_SIZE, *pixel_centres(_CHECK_SIZE))
    origin: Array = np.array(camera.position, np.float32)[:, None]
    solids = [body.solid(0) for body in bodies]
    seen = trace(solids, room, origin, directions).body
    areas = np.bincount(seen + 1, minlength=len(solids) + 1)[1:]
    _, enter, _ = solids[1].meet(origin, directions, np.einsum("in,in->n", directions, directions))
    whole = np.count_nonzero(enter < np.inf)
    border = seen.reshape(_CHECK_SIZE, _CHECK_SIZE)
    cut = any((edge == 0).any() for edge in (border[0], border[-1], border[:, 0], border[:, -1]))
    return bool(
        not cut
        and areas[0] == areas.max()
        and areas[0] >= 0.05 * _CHECK_SIZE**2
        and whole >= 0.02 * _CHECK_SIZE**2
        and 0.3 * whole <= areas[1] <= 0.85 * whole
    )


def _look(rng: np.random.Generator, variety: Variety) -> Look:
    first, second = (_color(rng, *ranges) for ranges in zip(variety.body_saturation, variety.body_value, strict=True))
    texture = _texture(rng, (first, second), _BODY_AXES, wavelength=variety.body_wavelength, plain=0.35)
    return Look(texture=texture, gloss=(0.0, 0.15, 0.4)[rng.integers(3)])


def _surfaces(rng: np.random.Generator, variety: Variety) -> tuple[Texture, Texture, Texture]:
    hue = (0.02, 0.14) if rng.random() < 0.7 else (0.0, 1.0)
    floor = _color(rng, variety.floor_saturation, variety.floor_value, hue)
    walls = _color(rng, variety.wall_saturation, variety.wall_value)
    ceiling = (0.75, 0.74, 0.72)
    on_floor, on_walls = variety.surface_wavelength
    return (
        _texture(rng, (floor, _shade(floor, rng.uniform(0.4, 0.75))), _FLOOR_AXES, wavelength=on_floor, plain=0.1),
        Texture(kind="plain", colors=(ceiling, ceiling), waves=((1.0, 0.0, 0.0),), phases=(0.0,)),
        _texture(rng, (walls, _shade(walls, rng.uniform(0.65, 0.88))), _WALL_AXES, wavelength=on_walls, plain=0.45),
    )


def _texture(
    rng: np.random.Generator, colors: tuple[Color, Color], axes: tuple[Vector, ...], wavelength: Range, plain: float
) -> Texture:
    """A texture striped along one of the axes or checked along all; `plain` is the probability of no pattern."""
    kind: Pattern = "plain" if rng.random() < plain else PATTERNS[rng.integers(3)]
    rate = 1 / rng.uniform(*wavelength)
    if kind == "stripes":
        waves = np.array(axes)[[rng.integers(len(axes))]] * rate
    elif kind == "checker":
        waves = np.array(axes) * (0.7 * rate)
    else:
        waves = rng.normal(size=(3, 3)) * (0.6 * rate)
    return Texture(
        kind=kind,
        colors=colors,
        waves=tuple((float(a), float(b), float(c)) for a, b, c in waves),
        phases=tuple(float(p) for p in rng.uniform(0, 1, len(waves))),
    )


def _color(rng: np.random.Generator, saturation: Range, value: Range, hue: Range = (0.0, 1.0)) -> Color:
    """A linear colour of a hue on the colour circle, a saturation and a value within these ranges."""
    h, s, v = rng.uniform(*hue), rng.uniform(*saturation), rng.uniform(*value)
    ramp = [min(max(abs((6 * h + k) % 6 - 3) - 1, 0.0), 1.0) for k in (0, 4, 2)]
    red, green, blue = (v * (1 - s + s * r) for r in ramp)
    return red, green, blue


def _shade(color: Color, factor: float) -> Color:
    return color[0] * factor, color[1] * factor, color[2] * factor
