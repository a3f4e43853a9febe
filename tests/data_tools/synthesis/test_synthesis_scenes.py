"""The synthetic scenes' ground truths against independent geometry."""

from collections.abc import Callable

import numpy as np
import pytest

from data_tools.synthesis import CLASS_NAMES, make_scene, render
from data_tools.synthesis.rendering import TARGET
from data_tools.synthesis.shapes import SHAPES
from dpt.errors import UserError

SIZE = 64


def _round(p: np.ndarray) -> np.ndarray:
    return np.hypot(p[0], p[2])


def _inside_box(p: np.ndarray) -> np.ndarray:
    return (np.abs(p) <= 1).all(0)


def _inside_polygon(p: np.ndarray, sides: int, radius: np.ndarray) -> np.ndarray:
    """Inside a regular polygon inscribed in a circle, edge midpoints at angles (k + 1/2) 2 pi / sides."""
    sector = 2 * np.pi / sides
    angle = np.mod(np.arctan2(p[2], p[0]), sector) - sector / 2
    return _round(p) * np.cos(angle) <= radius * np.cos(sector / 2)


def _inside_table(p: np.ndarray) -> np.ndarray:
    top = (np.abs(p[[0, 2]]) <= 1).all(0) & (p[1] >= 0.72) & (p[1] <= 1)
    legs = ((np.abs(p[[0, 2]]) >= 0.68) & (np.abs(p[[0, 2]]) <= 1)).all(0) & (p[1] >= -1) & (p[1] <= 0.72)
    return top | legs


def _inside_capsule(p: np.ndarray) -> np.ndarray:
    beyond = np.maximum(np.abs(p[1]) - 0.5, 0) / 0.5
    return _round(p) ** 2 + beyond**2 <= 1


INSIDE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "box": _inside_box,
    "capsule": _inside_capsule,
    "cone": lambda p: (_round(p) <= (1 - p[1]) / 2) & (np.abs(p[1]) <= 1),
    "cylinder": lambda p: (_round(p) <= 1) & (np.abs(p[1]) <= 1),
    "ellipsoid": lambda p: (p * p).sum(0) <= 1,
    "mushroom": lambda p: ((_round(p) <= 0.32) & (p[1] >= -1) & (p[1] <= 0.2)) | (((p * p).sum(0) <= 1) & (p[1] >= 0)),
    "prism": lambda p: _inside_polygon(p, 6, np.ones(p.shape[1])) & (np.abs(p[1]) <= 1),
    "pyramid": lambda p: _inside_polygon(p, 4, (1 - p[1]) / 2) & (np.abs(p[1]) <= 1),
    "sphere": lambda p: (p * p).sum(0) <= 1,
    "table": _inside_table,
}
"""Which points [3, N] of its unit cube a solid holds, written from its name rather than from its planes and quadrics."""


def _camera(scene, frame: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Position, axes (rows: right, down, forward), focal length in float64, from the camera's angles."""
    camera = scene.cameras[frame]
    yaw, pitch = camera.yaw, camera.pitch
    forward = np.array([np.sin(yaw) * np.cos(pitch), -np.sin(pitch), np.cos(yaw) * np.cos(pitch)])
    right = np.array([np.cos(yaw), 0.0, -np.sin(yaw)])
    down = -np.cross(forward, right)
    focal = SIZE / 2 / np.tan(camera.field_of_view / 2)
    return np.array(camera.position), np.stack([right, down, forward]), focal


def _rays(scene) -> tuple[np.ndarray, np.ndarray]:
    position, axes, focal = _camera(scene, 0)
    v, u = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
    directions = np.stack([(u - SIZE / 2) / focal, (v - SIZE / 2) / focal, np.ones_like(u)]).reshape(3, -1)
    return position, axes.T @ directions


def _to_unit(body, frame: int, points: np.ndarray) -> np.ndarray:
    pose = body.poses[frame]
    x, y, z = points - np.array(pose.position)[:, None]
    cos, sin = np.cos(pose.yaw), np.sin(pose.yaw)
    return np.stack([cos * x - sin * z, y, sin * x + cos * z]) / np.array(body.scale)[:, None]


def _owner(scene, points: np.ndarray) -> np.ndarray:
    """Number of the body that holds each point [3, N], -1 for none."""
    owner = np.full(points.shape[1], -1)
    for number, body in enumerate(scene.bodies):
        owner[INSIDE[body.class_name](_to_unit(body, 0, points))] = number
    return owner


def _in_room(scene, points: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(scene.room.yaw), np.sin(scene.room.yaw)
    x, y, z = points
    local = np.stack([cos * x - sin * z, y, sin * x + cos * z])
    return ((local > np.array(scene.room.low)[:, None]) & (local < np.array(scene.room.high)[:, None])).all(0)


@pytest.mark.parametrize("index", range(3))
def test_every_pixel_shows_the_first_surface_along_its_ray(index: int) -> None:
    """Nothing solid lies before the depth given, and just behind it something does (or the room ends)."""
    scene = make_scene(3, "val", index)
    depth = render(scene, SIZE).depth.reshape(-1).astype(np.float64)
    position, directions = _rays(scene)
    for share in np.linspace(0.05, 0.9995, 60):
        points = position[:, None] + directions * (depth * share)
        assert (_owner(scene, points) == -1).all()
        assert _in_room(scene, points).all()
    behind = position[:, None] + directions * (depth + 0.003)
    solid = (_owner(scene, behind) >= 0) | ~_in_room(scene, behind)
    assert solid.mean() > 0.995  # the other rays graze an edge thinner than 3 mm


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_each_solid_is_met_where_dense_sampling_meets_it(class_name: str) -> None:
    from data_tools.synthesis.shapes import intersect, surface_normals

    rng = np.random.default_rng(CLASS_NAMES.index(class_name))
    inside = INSIDE[class_name]
    for _ in range(4):
        origin = rng.normal(size=3)
        origin *= 4 / np.linalg.norm(origin)
        aims = rng.uniform(-1.1, 1.1, (3, 150))
        directions = aims - origin[:, None]
        enter, face = intersect(SHAPES[class_name], origin, directions)
        steps = np.linspace(0.3, 1.7, 1121)
        sampled = np.array([inside(origin[:, None] + directions * t) for t in steps])
        found = sampled.any(0)
        first = np.where(found, steps[sampled.argmax(0)], np.inf)
        assert (np.isfinite(enter) >= found).all()  # sampling may jump over a corner, never the reverse
        assert (np.isfinite(enter) & ~found).mean() < 0.03
        both = np.flatnonzero(found)
        late = np.abs(first[both] - enter[both]) > 1.5e-3
        assert late.mean() < 0.02
        points = (origin[:, None] + directions * np.where(np.isfinite(enter), enter, 0))[:, both].astype(np.float32)
        normals = surface_normals(SHAPES[class_name], points, face[both])
        assert ((normals * directions[:, both]).sum(0) < 1e-5).all()  # a ray enters against the outward normal


def test_flow_moves_the_visible_point_as_the_scene_does() -> None:
    for index in range(4):
        scene = make_scene(1, "train", index)
        truth = render(scene, SIZE)
        position, directions = _rays(scene)
        points = position[:, None] + directions * truth.depth.reshape(-1)
        owner = _owner(scene, points + 0.003 * directions)
        moved = points.copy()
        for number, body in enumerate(scene.bodies):
            mine = owner == number
            before, after = body.poses
            angle = after.yaw - before.yaw
            x, y, z = points[:, mine] - np.array(before.position)[:, None]
            turned = np.stack([np.cos(angle) * x + np.sin(angle) * z, y, np.cos(angle) * z - np.sin(angle) * x])
            moved[:, mine] = turned + np.array(after.position)[:, None]
        eye, axes, focal = _camera(scene, 1)
        x, y, z = axes @ (moved - eye[:, None])
        v, u = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
        expected = np.stack([focal * x / z + SIZE / 2 - u.ravel(), focal * y / z + SIZE / 2 - v.ravel()])
        error = np.abs(expected - truth.flow.reshape(2, -1)).max(0)
        assert np.mean(error < 2e-3) > 0.995
        assert np.median(error) < 1e-4


def test_flow_carries_the_second_picture_onto_the_first() -> None:
    from scipy.ndimage import map_coordinates

    gains = []
    for index in range(6):
        truth = render(make_scene(2, "train", index), 96)
        v, u = np.meshgrid(np.arange(96), np.arange(96), indexing="ij")
        at = np.stack([v + truth.flow[1], u + truth.flow[0]])
        seen = ((at > 0) & (at < 95)).all(0)
        warped = np.stack([map_coordinates(truth.next_image[..., c].astype(float), at, order=1) for c in range(3)], -1)
        error = np.abs(warped - truth.image)[seen]
        assert np.median(error) < 3
        gains.append(error.mean() / np.abs(truth.next_image.astype(float) - truth.image)[seen].mean())
    assert np.mean(gains) < 0.5


def test_masks_and_the_whole_object_agree() -> None:
    equal = []
    for index in range(8):
        scene = make_scene(0, "train", index)
        truth = render(scene, SIZE)
        assert not (truth.visible_mask & ~truth.whole_mask).any()
        assert 0.2 < truth.visible_mask.sum() / truth.whole_mask.sum() < 0.95
        grey = truth.whole.astype(float) @ [0.299, 0.587, 0.114]
        np.testing.assert_array_equal(grey <= 250, truth.whole_mask)
        assert (truth.whole[~truth.whole_mask] == 255).all()
        inner = truth.visible_mask.copy()
        for axis in (0, 1):
            for shift in (-2, -1, 1, 2):
                inner &= np.roll(truth.visible_mask, shift, axis)
        equal.append((truth.whole[inner] == truth.image[inner]).all(1))
        assert scene.bodies[TARGET].class_name != scene.class_name
    assert np.concatenate(equal).mean() > 0.8  # all but the body's own edges, which the picture softens


def test_arrays_have_the_stated_types() -> None:
    truth = render(make_scene(0, "test", 0), 40)
    for picture in (truth.image, truth.next_image, truth.whole):
        assert picture.dtype == np.uint8
        assert picture.shape == (40, 40, 3)
    assert truth.depth.dtype == truth.flow.dtype == np.float32
    assert truth.depth.shape == (40, 40)
    assert truth.flow.shape == (2, 40, 40)
    assert truth.visible_mask.dtype == truth.whole_mask.dtype == np.bool_
    assert CLASS_NAMES[truth.label] == truth.class_name


def test_a_scene_is_a_function_of_seed_split_and_index() -> None:
    assert make_scene(5, "train", 7) == make_scene(5, "train", 7)
    np.testing.assert_array_equal(render(make_scene(5, "train", 7), 32).image, render(make_scene(5, "train", 7), 32).image)
    drawn = {make_scene(*which).bodies for which in ((5, "train", 7), (6, "train", 7), (5, "val", 7), (5, "train", 8))}
    assert len(drawn) == 4
    assert list(CLASS_NAMES) == sorted(CLASS_NAMES)


def test_depth_is_wide_and_no_constant_guesses_it() -> None:
    errors = []
    for index in range(12):
        depth = render(make_scene(4, "train", index), 32).depth.astype(np.float64)
        assert depth.min() > 1
        assert depth.max() < 13
        best = min(np.abs(depth - guess).__truediv__(depth).mean() for guess in np.linspace(depth.min(), depth.max(), 60))
        errors.append(best)
    assert np.mean(errors) > 0.3


def test_all_classes_come_about_equally_often_and_the_main_body_is_the_largest_in_view() -> None:
    counts = np.bincount([make_scene(9, "train", index).label for index in range(120)], minlength=len(CLASS_NAMES))
    assert counts.min() >= 4
    assert len(CLASS_NAMES) >= 8


@pytest.mark.parametrize(("seed", "split", "index"), [(0, "training", 0), (-1, "train", 0), (0, "train", -1)])
def test_bad_arguments_are_named(seed: int, split: str, index: int) -> None:
    with pytest.raises(UserError, match=r"split|seed"):
        make_scene(seed, split, index)
