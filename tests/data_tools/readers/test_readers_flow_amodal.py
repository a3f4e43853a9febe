"""Optical flow and amodal sets in their true layouts and file formats, at small size."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.native.files import save, write
from data_tools.readers import Excluded, ReadError, open_reader
from dpt.errors import UserError
from dpt.pictures import flo_bytes
from tests.data_tools.readers.reader_layouts import chairs, picture, read_all


def test_flying_chairs_split_by_line(tmp_path: Path) -> None:
    chairs(tmp_path / "FlyingChairs_release", [1, 2, 1])
    train = read_all(open_reader("flying_chairs", tmp_path / "FlyingChairs_release", "train"))
    assert list(train) == ["00001", "00003"]
    assert open_reader("flying_chairs", tmp_path, "val").keys() == ["00002"]
    sample = train["00003"]
    assert (sample.images[0] == 2).all()
    assert len(sample.images) == 2
    assert (sample.flow == 2.5).all()


def test_unknown_flow_is_invalid(tmp_path: Path) -> None:
    chairs(tmp_path, [1])
    flow = np.ones((2, 6, 8), np.float32)
    flow[0, 0, 0], flow[1, 2, 3] = 1e10, np.nan
    write(tmp_path / "data/00001_flow.flo", flo_bytes(flow))
    sample = open_reader("flying_chairs", tmp_path, "train").read("00001")
    assert (~sample.valid).sum() == 2
    assert not sample.flow[:, ~sample.valid].any()


def test_a_wrong_split_file_is_named(tmp_path: Path) -> None:
    chairs(tmp_path, [1, 1])
    write(tmp_path / "FlyingChairs_train_val.txt", "1\n")
    with pytest.raises(UserError, match="1 lines for 2 pairs"):
        open_reader("flying_chairs", tmp_path, "train")


# ------------------------------------------------------------------------------------------------------------------ amodal
def gestalt(root: Path, names: list[str]) -> np.ndarray:
    mask = np.zeros((12, 16), np.uint8)
    mask[2:9, 3:12] = 255
    for name in names:
        save(root / "occlusion" / f"{name}_occlusion.png", picture())
        save(root / "whole" / f"{name}_whole.png", picture())
        save(root / "whole_mask" / f"{name}_whole_mask.png", mask)
        save(root / "visible_object_mask" / f"{name}_visible_mask.png", np.where(np.arange(16) < 8, mask, 0).astype(np.uint8))
    return mask == 255


def test_pix2gestalt_holds_out_the_last_hundredth_of_the_file_names(tmp_path: Path) -> None:
    mask = gestalt(tmp_path, ["10", "100", "1000", "9"])
    assert open_reader("pix2gestalt", tmp_path, "train").keys() == ["1000", "100", "10"]  # "10_" sorts after "1000"
    ((key, sample),) = read_all(open_reader("pix2gestalt", tmp_path, "val")).items()
    assert key == "9"
    np.testing.assert_array_equal(sample.mask, mask)
    np.testing.assert_array_equal(sample.images[1], np.repeat((mask & (np.arange(16) < 8))[..., None], 3, -1) * np.uint8(255))
    assert sample.whole is not None
    with pytest.raises(UserError, match="test"):
        open_reader("pix2gestalt", tmp_path, "test")
    write(tmp_path / "test.txt", "10\n")
    assert open_reader("pix2gestalt", tmp_path, "test").keys() == ["10"]


def coco_structure(segmentations: list[Any], visible: dict[str, Any]) -> dict[str, Any]:
    regions = [
        {"segmentation": segmentations[0], "visible_mask": visible, "isStuff": 0, "name": "chair", "order": 1},
        {"segmentation": segmentations[1], "isStuff": 0, "name": "cup", "order": 2},
        {"segmentation": segmentations[1], "visible_mask": visible, "isStuff": 1, "name": "wall", "order": 3},
        {"segmentation": segmentations[0], "visible_mask": {"size": [12, 16], "counts": [192]}, "isStuff": 0, "name": "gone"},
    ]
    image = {"id": 42, "file_name": "COCO_val2014_000000000042.jpg", "height": 12, "width": 16}
    return {"images": [image], "annotations": [{"image_id": 42, "regions": regions}]}


def check_regions(name: str, root: Path, mask: np.ndarray, visible: np.ndarray) -> None:
    reader = open_reader(name, root, "val")
    stem = "COCO_val2014_000000000042"
    assert reader.keys() == [f"{stem}_000", f"{stem}_003"]
    sample = reader.read(f"{stem}_000")
    np.testing.assert_array_equal(sample.mask, mask)
    np.testing.assert_array_equal(sample.images[1][..., 1] == 255, visible)
    assert sample.meta["region"] == "chair"
    with pytest.raises(Excluded, match="visible"):
        reader.read(f"{stem}_003")
    everything = open_reader(name, root, "val", occluded_only=False)
    unhidden = everything.read(f"{stem}_001")
    np.testing.assert_array_equal(unhidden.images[1][..., 0] == 255, unhidden.mask)


def _masks() -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    mask, visible = np.zeros((2, 12, 16), bool)
    mask[2:10, 4:12] = True
    visible[2:10, 4:8] = True
    runs = [4 * 12 + 2, 8, 4, 8, 4, 8, 4, 8, 192 - 4 * 12 - 2 - 44]
    return mask, visible, {"size": [12, 16], "counts": runs}


def test_coco_amodal(tmp_path: Path) -> None:
    mask, visible, rle = _masks()
    square = [4, 2, 12, 2, 12, 10, 4, 10]
    save(tmp_path / "val2014/COCO_val2014_000000000042.jpg", picture())
    content = coco_structure([square, [1.0, 1.0, 5.0, 1.0, 5.0, 5.0]], rle)
    write(tmp_path / "annotations/COCO_amodal_val2014.json", json.dumps(content))
    check_regions("coco_amodal", tmp_path, mask, visible)
    (tmp_path / "val2014").rename(tmp_path / "elsewhere")
    moved = open_reader("coco_amodal", tmp_path, "val", annotations="annotations/COCO_amodal_val2014.json", images="elsewhere")
    assert moved.read(moved.keys()[0]).mask is not None
    with pytest.raises(ReadError, match="missing"):
        open_reader("coco_amodal", tmp_path, "val").read(moved.keys()[0])
    write(tmp_path / "annotations/COCO_amodal_val2014.json", '{"images": []}')
    with pytest.raises(UserError, match="COCO-A's structure"):
        open_reader("coco_amodal", tmp_path, "val")
    write(tmp_path / "annotations/COCO_amodal_val2014.json", '{"images": [')
    with pytest.raises(UserError, match="no JSON"):
        open_reader("coco_amodal", tmp_path, "val")


def test_mp3d_amodal(tmp_path: Path) -> None:
    mask, visible, rle = _masks()
    whole = {"size": [12, 16], "counts": [4 * 12 + 2, *[8, 4] * 7, 8, 192 - 4 * 12 - 2 - 92]}
    save(tmp_path / "images/COCO_val2014_000000000042.jpg", picture())
    write(tmp_path / "mp3d_eval.pkl", pickle.dumps(coco_structure([whole, whole], rle)))
    check_regions("mp3d_amodal", tmp_path, mask, visible)
    write(tmp_path / "mp3d_eval.pkl", pickle.dumps({"images": Path("x")}))
    with pytest.raises(UserError, match="no plain data"):
        open_reader("mp3d_amodal", tmp_path, "val")
