"""EXR and PLY, read back by small readers written from the formats' own descriptions."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest

from dpt.evaluation.depth_files import point_cloud, write_exr, write_ply


def read_exr(path: Path) -> np.ndarray:
    """A one-channel uncompressed float32 EXR, by "OpenEXR File Layout"."""
    data = path.read_bytes()
    assert struct.unpack_from("<2i", data) == (20000630, 2)
    at, attributes = 8, {}
    while data[at]:
        name, kind, _ = data[at:].split(b"\0", 2)
        at += len(name) + len(kind) + 2
        (size,) = struct.unpack_from("<i", data, at)
        attributes[name.decode()] = (kind.decode(), data[at + 4 : at + 4 + size])
        at += 4 + size
    at += 1
    required = {"channels", "compression", "dataWindow", "displayWindow", "lineOrder", "pixelAspectRatio"}
    assert required | {"screenWindowCenter", "screenWindowWidth"} == attributes.keys()
    assert attributes["compression"][1] == b"\0"
    assert attributes["channels"][1][:2] == b"Y\0"
    left, top, right, bottom = struct.unpack("<4i", attributes["dataWindow"][1])
    rows = []
    for y, offset in enumerate(struct.unpack_from(f"<{bottom - top + 1}Q", data, at)):
        assert struct.unpack_from("<2i", data, offset) == (y, 4 * (right - left + 1))
        rows.append(np.frombuffer(data, "<f4", right - left + 1, offset + 8))
    assert offset + 8 + 4 * (right - left + 1) == len(data)
    return np.stack(rows)


def test_exr_holds_the_very_values(tmp_path):
    values = np.random.default_rng(0).normal(0, 5, (7, 11)).astype(np.float32)
    write_exr(tmp_path / "a.exr", values)
    assert (read_exr(tmp_path / "a.exr") == values).all()


def test_other_programs_read_the_exr(tmp_path):
    OpenEXR = pytest.importorskip("OpenEXR")
    values = np.random.default_rng(0).normal(0, 5, (7, 11)).astype(np.float32)
    write_exr(tmp_path / "a.exr", values)
    with OpenEXR.File(str(tmp_path / "a.exr")) as file:
        assert (file.channels()["Y"].pixels == values).all()


def test_points_lie_on_the_rays_of_their_pixels():
    depth = np.array([[2.0, 4.0], [2.0, 6.0]], np.float32)
    focal = 0.5 * 2 / math.tan(math.radians(90) / 2)  # 90 degrees over two pixels: one pixel a unit at distance 1
    points = point_cloud(depth, focal)
    np.testing.assert_allclose(points[0, 0], (-1.0, -1.0, 2.0), rtol=1e-6)
    np.testing.assert_allclose(points[1, 1], (3.0, 3.0, 6.0), rtol=1e-6)


def test_ply_is_what_its_header_says(tmp_path):
    points = np.arange(18, dtype=np.float32).reshape(2, 3, 3)
    colours = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    write_ply(tmp_path / "a.ply", points, colours)
    header, body = (tmp_path / "a.ply").read_bytes().split(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:3] == ["ply", "format binary_little_endian 1.0", "element vertex 6"]
    assert [line.split()[-1] for line in lines[3:]] == ["x", "y", "z", "red", "green", "blue"]
    assert len(body) == 6 * 15
    vertices = [struct.unpack_from("<3f3B", body, 15 * i) for i in range(6)]
    assert vertices[4] == (12.0, 13.0, 14.0, 12, 13, 14)
