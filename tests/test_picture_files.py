"""One reader of pictures, one of masks and one of flow, whatever they were saved as."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from dpt.errors import UserError
from dpt.evaluation.given import read_prediction
from dpt.pictures import decode_picture, flo_bytes, read_flo, read_mask, read_picture

RAMP = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (8, 1))
MASK = np.arange(16)[None, :].repeat(8, 0) > 7
CHAIRS = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "flying_chairs" / "data"


@pytest.mark.parametrize("kind", ["L", "RGB", "RGBA", "LA", "P", "CMYK", "16", "exif"])
def test_pictures_of_every_kind_show_the_same(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("ramp.tif" if kind == "CMYK" else "ramp.png")
    stored = RAMP
    if kind == "16":
        Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        stored = RAMP[::-1, ::-1]
        Image.fromarray(stored).save(path, exif=exif)
    else:
        Image.fromarray(RAMP).convert(kind).save(path)
    np.testing.assert_allclose(read_picture(path), np.repeat(RAMP[..., None], 3, -1), atol=1)
    np.testing.assert_array_equal(decode_picture(path.read_bytes()), read_picture(path))
    np.testing.assert_allclose(decode_picture(path, upright=False)[..., 0], stored, atol=1)


def test_floating_point_pictures_are_refused_rather_than_shown_black(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.float32) / 255).save(tmp_path / "ramp.tif")
    with pytest.raises(UserError, match=r"ramp\.tif: not a picture that can be read \(its pixels are floating-point numbers"):
        read_picture(tmp_path / "ramp.tif")


@pytest.mark.parametrize("kind", ["0/1", "0/255", "1 bit", "16", "palette", "RGB", "bool.npy", "uint8.npy", "float.npy"])
def test_masks_of_every_kind_are_the_same(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("mask.npy" if kind.endswith("npy") else "mask.png")
    values = {"bool.npy": MASK, "uint8.npy": MASK * np.uint8(255), "float.npy": MASK.astype(np.float32)}
    if kind in values:
        np.save(path, values[kind])
    elif kind == "palette":
        picture = Image.fromarray(MASK.astype(np.uint8), mode="P")
        picture.putpalette([0, 0, 0, 128, 0, 0])
        picture.save(path)
    else:
        factor = {"0/1": np.uint8(1), "16": np.uint16(65535)}.get(kind, np.uint8(255))
        picture = Image.fromarray(MASK * factor)
        (picture.convert("1" if kind == "1 bit" else "RGB") if kind in ("1 bit", "RGB") else picture).save(path)
    np.testing.assert_array_equal(read_mask(path), MASK)
    np.testing.assert_array_equal(read_prediction(tmp_path, "mask", "amodal", MASK.shape), MASK)


def test_empty_masks_and_other_arrays_are_refused(tmp_path: Path) -> None:
    Image.fromarray(MASK * np.uint8(0)).save(tmp_path / "empty.png")
    np.save(tmp_path / "line.npy", np.ones(4))
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    for name, words in (("empty.png", "the mask is empty"), ("line.npy", "is no mask"), ("cut.npy", "not a mask")):
        with pytest.raises(UserError, match=words):
            read_mask(tmp_path / name)


@settings(max_examples=50, deadline=None)
@given(
    flow=arrays(
        np.float32, st.tuples(st.just(2), st.integers(1, 9), st.integers(1, 9)), elements=st.floats(-1e3, 1e3, width=32)
    )
)
def test_flo_files_are_read_and_written(tmp_path_factory: pytest.TempPathFactory, flow: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("flo") / "a.flo"
    _, height, width = flow.shape
    content = struct.pack("<fii", 202021.25, width, height) + flow.transpose(1, 2, 0).astype("<f4").tobytes()
    assert flo_bytes(flow) == content
    path.write_bytes(content)
    np.testing.assert_array_equal(read_flo(path), flow)


@pytest.mark.skipif(not CHAIRS.exists(), reason="needs the real samples")
def test_real_flo_files_are_rewritten_byte_for_byte() -> None:
    for path in CHAIRS.glob("*.flo"):
        flow = read_flo(path)
        assert flow.shape == (2, 384, 512)
        assert flo_bytes(flow) == path.read_bytes()


@pytest.mark.parametrize(
    "content",
    [b"", b"PIEH", struct.pack("<fii", 1.0, 1, 1) + bytes(8), struct.pack("<fii", 202021.25, 2, 2) + bytes(31),
     struct.pack("<fii", 202021.25, -1, -1) + bytes(8)],
)  # fmt: skip
def test_broken_flo_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.flo").write_bytes(content)
    with pytest.raises(ValueError, match=r"flo"):
        read_flo(tmp_path / "a.flo")
