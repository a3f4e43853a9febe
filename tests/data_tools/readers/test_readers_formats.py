"""Single file formats: depth, run lengths, polygons, pickles, tars."""

import io
import os
import pickle
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from data_tools.native.files import encode_rle
from data_tools.readers import open_reader
from data_tools.readers.files import read_png16
from data_tools.readers.rle import decode_polygons, decode_rle
from data_tools.readers.tars import list_members
from data_tools.readers.unpickle import load_plain_pickle
from dpt.errors import UserError

MASKS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20))


def run_lengths(mask: np.ndarray) -> list[int]:
    """Down the columns, zeros first."""
    pixels = np.concatenate([[False], mask.T.ravel()])
    (changes,) = np.nonzero(pixels[1:] != pixels[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


@settings(max_examples=100, deadline=None)
@given(mask=MASKS)
@example(mask=np.pad(np.ones((500, 600), bool), 100))
def test_run_lengths_of_all_spellings_decode(mask: np.ndarray) -> None:
    runs, compressed = run_lengths(mask), encode_rle(mask)["counts"]
    for counts in (runs, np.array(runs), compressed, compressed.encode()):
        np.testing.assert_array_equal(decode_rle({"size": list(mask.shape), "counts": counts}), mask)


@pytest.mark.parametrize("counts", [[3, 4], [3, -1, 10], "13\x01", "1", "14\xff", "Q"])
def test_broken_run_lengths_are_refused(counts: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_rle({"size": [3, 4], "counts": counts})


@pytest.mark.parametrize(
    ("polygon", "counts"),
    [  # made with pycocotools 2.0 for 10 rows and 12 columns
        ([1.2, 1.7, 9.6, 2.1, 7.3, 8.9, 2.0, 6.5], "<194L001O001O00Mo0"),
        ([-3.0, 2.0, 5.5, -1.0, 14.0, 5.0, 6.0, 12.5, 4.0, 6.0], "1370O2O1O2Nf0O[O1N2N1ON"),
    ],
)
def test_polygons_are_filled_as_by_coco(polygon: list[float], counts: str) -> None:
    expected = decode_rle({"size": [10, 12], "counts": counts})
    np.testing.assert_array_equal(decode_polygons(polygon, 10, 12), expected)
    np.testing.assert_array_equal(decode_polygons([polygon], 10, 12), expected)
    shifted = decode_polygons([polygon, [0, 0, 2, 0, 2, 2, 0, 2]], 10, 12)
    assert shifted[:2, :2].all()
    assert (shifted >= expected).all()


@settings(max_examples=100, deadline=None)
@given(box=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9)))
def test_a_rectangle_covers_its_pixels(box: tuple[int, int, int, int]) -> None:
    x, y, w, h = box
    expected = np.zeros((20, 20), bool)
    expected[y : y + h, x : x + w] = True
    np.testing.assert_array_equal(decode_polygons([x, y, x + w, y, x + w, y + h, x, y + h], 20, 20), expected)


def test_a_polygon_of_two_points_is_refused() -> None:
    with pytest.raises(ValueError, match="2 points"):
        decode_polygons([0, 0, 5, 5], 10, 10)


def test_16_bit_depth_decodes_in_its_unit(tmp_path: Path) -> None:
    stored = np.array([[0, 1, 256], [1000, 40000, 65535]], np.uint16)
    Image.fromarray(stored).save(tmp_path / "depth.png")
    for units in (1000.0, 256.0):
        depth = read_png16(tmp_path / "depth.png", units)
        assert depth.dtype == np.float32
        np.testing.assert_allclose(depth, stored / units, rtol=1e-7)
    Image.fromarray(stored.astype(np.uint8)).save(tmp_path / "eight.png")
    with pytest.raises(ValueError, match="mode L"):
        read_png16(tmp_path / "eight.png", 1000)


def test_pictures_whose_truth_is_the_folder_are_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.repeat(np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)[..., None], 3, -1))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    found = open_reader("image_folder", tmp_path, "x").read("a").images[0]
    np.testing.assert_array_equal(found, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_plain_data_load(tmp_path: Path, protocol: int) -> None:
    content = {
        "images": [{"file_name": "a.jpg", "size": (3, 4), "tags": {"x"}, "frozen": frozenset([1])}],
        "raw": b"\x00\xff", "flag": None, "ordered": OrderedDict(a=1), "numbers": [1.5, 2**70, True], "c": 1j,
    }  # fmt: skip
    arrays_in = {"array": np.arange(6.0).reshape(2, 3), "scalar": np.float64(2.5), "ids": np.array([1, 2], np.int32)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({**content, **arrays_in}, protocol))
    loaded = load_plain_pickle(tmp_path / "a.pkl")
    for name, array in arrays_in.items():
        np.testing.assert_array_equal(loaded.pop(name), array)
    assert loaded == content


class _Evil:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    "evil",
    [_Evil(os.system, "echo bad"), _Evil(eval, "1"), _Evil(getattr, "a", "upper"), _Evil(np.load, "x"), Path("x"),
     _Evil(__import__, "os"), np.array([Path("x")], object), _Evil(open, "x")],
)  # fmt: skip
def test_pickles_of_anything_else_are_refused(tmp_path: Path, evil: object) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"images": [], "annotations": evil}))
    with pytest.raises(pickle.UnpicklingError, match="no plain data"):
        load_plain_pickle(tmp_path / "a.pkl")


def test_a_pickle_cannot_reach_attributes_of_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.")
    with pytest.raises(pickle.UnpicklingError):
        load_plain_pickle(tmp_path / "a.pkl")


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_members_of_tars_and_of_tars_in_them_are_read_in_place(tmp_path: Path) -> None:
    inner = _tar({"n1_1.JPEG": b"one", "n1_2.JPEG": b"two" * 1000})
    (tmp_path / "a.tar").write_bytes(_tar({"first.txt": b"x", "n1.tar": inner, "last.txt": b"end"}))
    members = {member.name: member.read() for member in list_members(tmp_path / "a.tar")}
    assert members == {"first.txt": b"x", "n1/n1_1.JPEG": b"one", "n1/n1_2.JPEG": b"two" * 1000, "last.txt": b"end"}


def test_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match=r"a\.tar is no plain tar"):
        list(list_members(tmp_path / "a.tar"))
