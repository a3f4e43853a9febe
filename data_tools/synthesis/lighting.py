"""How surfaces look: solid textures, Lambert and Blinn-Phong light of one lamp, ambient light dimmed near contacts."""

import numpy as np
from numpy.typing import NDArray

from data_tools.synthesis.scenes import Scene, Texture
from data_tools.synthesis.shapes import SHAPES, Array, surface_normals
from data_tools.synthesis.tracing import CEILING, FLOOR, Solid

_AMBIENT = np.float32(0.3)
_LAMP = (np.float32(5.2), np.float32(2.0), np.float32(0.6))
"""Lamp strength a / (b + c distance^2): softer than the inverse square of a point, as from a large lamp."""
_BRIGHTEST_BODY = np.float32(0.85)
"""Keeps a body's pixels under grey 240, so that it stands out from a white ground."""


class SceneLight:
    """Light and geometry of a frame, for shading."""

    def __init__(self, scene: Scene, solids: list[Solid], focal: float) -> None:
        self.scene, self.solids = scene, solids
        self.focal = np.float32(focal)
        self.lamp: Array = np.array(scene.lamp, np.float32)[:, None]
        self.warmth: Array = np.array(scene.warmth, np.float32)[:, None]


def shade_body(
    light: SceneLight, number: int, points: Array, faces: NDArray[np.int16], t: Array, lit: Array, rays: Array
) -> Array:
    """Linear colours float32 [3, N] of points [3, N] on body `number`, at depths t [N] along rays [3, N]."""
    solid, look = light.solids[number], light.scene.looks[number]
    local = solid.to_local @ (points - solid.centre)
    normals = body_normals(solid, local, faces)
    to_lamp, strength = _lamp(light, points, lit)
    facing = np.maximum(np.einsum("in,in->n", normals, to_lamp), 0)
    ambient = _AMBIENT * (np.float32(0.8) + np.float32(0.3) * normals[1])
    ambient *= 1 - np.float32(0.35) * np.exp(points[1] * np.float32(-5))  # the floor takes light from a body's foot
    colors = texture_colors(look.texture, local, t / light.focal) * (ambient + light.warmth * (facing * strength))
    if look.gloss:
        half = (to_lamp - rays / np.sqrt(squared_length(rays))).astype(np.float32, copy=False)
        cosine = np.maximum(np.einsum("in,in->n", half, normals), 0) / np.sqrt(squared_length(half))
        eighth = np.square(np.square(np.square(cosine)))
        colors += np.float32(look.gloss) * strength * eighth * eighth * eighth
    return np.minimum(colors, _BRIGHTEST_BODY)


def body_normals(solid: Solid, local: Array, faces: NDArray[np.int16]) -> Array:
    """Outward unit normals in the world, float32 [3, N], at points [3, N] of a body's surface, given in its metric axes."""
    inverse_scale: Array = np.array([1 / extent for extent in solid.scale], np.float32)[:, None]
    normals = solid.to_local.T @ (surface_normals(SHAPES[solid.shape], local * inverse_scale, faces) * inverse_scale)
    normals /= np.sqrt(squared_length(normals))
    return normals


def shade_room(light: SceneLight, points: Array, faces: NDArray[np.int16], t: Array, lit: Array) -> Array:
    """Linear colours float32 [3, N] of points [3, N] on the room's faces, at depths t [N]."""
    room = light.scene.room
    local = room.to_local @ points
    to_lamp, strength = _lamp(light, points, lit)
    to_lamp = np.abs(room.to_local @ to_lamp)  # the lamp hangs inside: every face turns towards it
    floor, ceiling = faces == FLOOR, faces == CEILING
    flat = floor | ceiling
    facing = to_lamp[1].copy()
    np.copyto(facing, to_lamp[0], where=faces < FLOOR)
    np.copyto(facing, to_lamp[2], where=faces > CEILING)
    openness = _openness(light, points, local, floor)
    diffuse = light.warmth * (facing * strength) + _AMBIENT * openness
    albedo = np.empty_like(points)
    for texture, mine in zip(light.scene.surfaces, (floor, ceiling, ~flat), strict=True):
        (index,) = mine.nonzero()
        if index.size:
            put_columns(albedo, index, texture_colors(texture, local.take(index, axis=1), t[index] / light.focal))
    return albedo * diffuse


def _lamp(light: SceneLight, points: Array, lit: Array) -> tuple[Array, Array]:
    """Unit vectors to the lamp [3, N] and its strength [N] where it is visible (lit in [0, 1])."""
    to_lamp = light.lamp - points
    distance2 = squared_length(to_lamp)
    to_lamp /= np.sqrt(distance2)
    a, b, c = _LAMP
    return to_lamp, lit * (a / (b + c * distance2))


def _openness(light: SceneLight, points: Array, local: Array, floor: NDArray[np.bool_]) -> Array:
    """Share of ambient light that reaches points of the room: less in its corners and under bodies."""
    room = light.scene.room
    openness = np.ones(points.shape[1], np.float32)
    for axis in range(3):
        gap = np.minimum(local[axis] - np.float32(room.low[axis]), np.float32(room.high[axis]) - local[axis])
        openness *= 1 - np.float32(0.32) * np.exp(gap * np.float32(-2.2))
    openness *= np.float32(1 / (1 - 0.32))  # a point's own face has gap 0
    (grounded,) = floor.nonzero()
    x, z = points[0][grounded], points[2][grounded]
    contact = np.ones(grounded.size, np.float32)
    for solid in light.solids:
        radius2 = np.float32(solid.scale[0] * solid.scale[2])
        distance2 = np.square(x - np.float32(solid.pose.position[0])) + np.square(z - np.float32(solid.pose.position[2]))
        closeness = radius2 / (radius2 + distance2)
        contact *= 1 - np.float32(0.8) * closeness * closeness
    openness[grounded] *= contact
    return openness


def texture_colors(texture: Texture, points: Array, footprint: Array) -> Array:
    """Colours [3, N] at points [3, N] in metric local axes. Waves too fine for pixels of `footprint` metres fade out."""
    low, high = (np.array(color, np.float32)[:, None] for color in texture.colors)
    if texture.kind == "plain":
        return low
    waves = np.array(texture.waves, np.float32)
    sines = np.sin(np.float32(2 * np.pi) * (waves @ points + np.array(texture.phases, np.float32)[:, None]))
    resolved = np.float32(0.14 / np.abs(waves).max()) / footprint
    if texture.kind == "noise":
        return low + (high - low) * (np.float32(0.5) + sines.mean(0) * np.minimum(np.float32(0.6), resolved))
    wave = sines[0] if texture.kind == "stripes" else sines.prod(0)
    return low + (high - low) * (np.float32(0.5) + np.clip(wave * np.minimum(np.float32(2.5), resolved), -0.5, 0.5))


def put_columns(table: Array, columns: NDArray[np.intp], values: Array) -> None:
    """table[:, columns] = values, row by row, which numpy does several times faster."""
    for row, new in zip(table, values, strict=True):
        row[columns] = new


def squared_length(vectors: Array) -> Array:
    """Squared lengths of vectors [3, N]: float32 [N]."""
    return np.einsum("in,in->n", vectors, vectors)


def smooth_within(values: NDArray[np.bool_], mask: NDArray[np.bool_], size: int, radius: int) -> Array:
    """Mean of values [size * size] over the masked pixels within a square of +- radius; 1 where there is none."""
    weights = mask.astype(np.float32)
    total, count = _box_sum(np.stack([weights * values, weights]).reshape(2, size, size), radius).reshape(2, -1)
    return np.where(count > 0, total / np.maximum(count, 1), np.float32(1))


def _box_sum(values: Array, radius: int) -> Array:
    """Sums over squares of +- radius of float32 [..., H, W], zeros beyond the border."""
    for _ in range(2):  # down the columns; then, transposed, along the rows
        length = values.shape[-2]
        padded = np.zeros((*values.shape[:-2], length + 2 * radius, values.shape[-1]), np.float32)
        padded[..., radius : radius + length, :] = values
        total = padded[..., :length, :].copy()
        for shift in range(1, 2 * radius + 1):
            total += padded[..., shift : shift + length, :]
        values = total.swapaxes(-1, -2)
    return values
