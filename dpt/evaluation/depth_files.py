"""Depth in the file formats of other programs: OpenEXR and PLY point clouds, written without extra libraries."""

import struct
from pathlib import Path

import numpy as np


def write_exr(path: Path, values: np.ndarray) -> None:
    """Write float `[H, W]` as an OpenEXR file: one float32 channel "Y", uncompressed scan lines.

    The format follows "OpenEXR File Layout" (openexr.com): magic, version 2, attributes, a table of line offsets, lines.
    """
    height, width = values.shape
    window = struct.pack("<4i", 0, 0, width - 1, height - 1)
    channel = b"Y\0" + struct.pack("<iB3x2i", 2, 0, 1, 1) + b"\0"  # float32, no sub-sampling; the empty name ends the list
    attributes = [
        ("channels", "chlist", channel),
        ("compression", "compression", b"\0"),
        ("dataWindow", "box2i", window),
        ("displayWindow", "box2i", window),
        ("lineOrder", "lineOrder", b"\0"),
        ("pixelAspectRatio", "float", struct.pack("<f", 1.0)),
        ("screenWindowCenter", "v2f", struct.pack("<2f", 0.0, 0.0)),
        ("screenWindowWidth", "float", struct.pack("<f", 1.0)),
    ]
    header = struct.pack("<2i", 20000630, 2)
    for name, kind, content in attributes:
        header += f"{name}\0{kind}\0".encode() + struct.pack("<i", len(content)) + content
    header += b"\0"
    line = 8 + 4 * width
    first = len(header) + 8 * height
    offsets = first + line * np.arange(height, dtype="<u8")
    lines = np.empty(height, dtype=np.dtype([("y", "<i4"), ("size", "<i4"), ("row", "<f4", (width,))]))
    lines["y"], lines["size"], lines["row"] = np.arange(height), 4 * width, values
    with path.open("wb") as file:
        file.write(header)
        file.write(offsets.tobytes())
        file.write(lines.tobytes())


def point_cloud(depth: np.ndarray, focal: float) -> np.ndarray:
    """Points float32 `[H, W, 3]` of a depth map `[H, W]`, for a pinhole camera of `focal` length in pixels.

    x points right, y down, and z = depth along the axis, which passes through the picture's centre; pixels are square.
    Depth and points share a unit.
    """
    height, width = depth.shape
    x = (np.arange(width) + 0.5 - 0.5 * width) / focal
    y = (np.arange(height) + 0.5 - 0.5 * height) / focal
    return np.stack([x[None, :] * depth, y[:, None] * depth, depth], axis=-1).astype(np.float32)


def write_ply(path: Path, points: np.ndarray, colours: np.ndarray) -> None:
    """Write points float `[H, W, 3]` with their colours uint8 `[H, W, 3]` as a binary PLY point cloud."""
    vertices = np.empty(points.shape[0] * points.shape[1], dtype=np.dtype([("xyz", "<f4", (3,)), ("rgb", "u1", (3,))]))
    vertices["xyz"], vertices["rgb"] = points.reshape(-1, 3), colours.reshape(-1, 3)
    names = [f"property float {n}" for n in "xyz"] + [f"property uchar {n}" for n in ("red", "green", "blue")]
    header = "\n".join(["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}", *names, "end_header", ""])
    with path.open("wb") as file:
        file.write(header.encode())
        file.write(vertices.tobytes())
