"""One reader of pictures and one of masks, whatever they were saved as."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpt.errors import UserError
from dpt.evaluation.given import read_prediction
from dpt.pictures import read_mask, read_picture

RAMP = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (8, 1))
MASK = np.arange(16)[None, :].repeat(8, 0) > 7


@pytest.mark.parametrize("kind", ["L", "RGB", "RGBA", "LA", "P", "16", "exif"])
def test_pictures_of_every_kind_show_the_same(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ramp.png"
    if kind == "16":
        Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        Image.fromarray(RAMP[::-1, ::-1]).save(path, exif=exif)
    else:
        Image.fromarray(RAMP).convert(kind).save(path)
    np.testing.assert_allclose(read_picture(path), np.repeat(RAMP[..., None], 3, -1), atol=1)


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
