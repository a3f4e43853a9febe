"""Where readers meet protocols, options meet the command line, and files meet the one picture reader."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.native.files import save, write
from data_tools.readers import READERS, open_reader, parse_options
from dpt.errors import UserError
from dpt.evaluation.protocols import find_protocol
from dpt.pictures import decode_mask, decode_picture
from tests.data_tools.reader_layouts import picture

TASKS = {"flying_chairs": "flow", "pix2gestalt": "amodal", "coco_amodal": "amodal", "mp3d_amodal": "amodal"}


@pytest.mark.parametrize("name", sorted(set(READERS) - {"imagenet", "image_folder"}))
def test_every_reader_has_a_protocol(name):
    assert find_protocol(name, TASKS.get(name, "depth")).task == TASKS.get(name, "depth")


def test_options_have_the_types_of_the_readers_signature():
    assert parse_options("hypersim", {"filtered": "False", "filename_list": "a.txt"}) == {
        "filtered": False,
        "filename_list": "a.txt",
    }
    assert parse_options("coco_amodal", {"occluded_only": "true"}) == {"occluded_only": True}
    with pytest.raises(UserError, match="choose one of true, false"):
        parse_options("hypersim", {"filtered": "nope"})
    with pytest.raises(UserError, match="has no option 'filterd'; it has filename_list, filtered"):
        parse_options("hypersim", {"filterd": "1"})


def test_exif_orientation_is_honoured(tmp_path):
    image = Image.fromarray(np.repeat(np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)[..., None], 3, -1))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    stored = np.asarray(image)
    np.testing.assert_array_equal(decode_picture(tmp_path / "a.png"), np.rot90(stored, -1))
    np.testing.assert_array_equal(decode_picture(tmp_path / "a.png", upright=False), stored)
    np.testing.assert_array_equal(open_reader("image_folder", tmp_path, "x").read("a").images[0], np.rot90(stored, -1))


def test_deep_grey_and_masks_of_any_range(tmp_path):
    deep = np.array([[0, 257 * 100], [65535, 257]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "d.png")
    np.testing.assert_array_equal(decode_picture(tmp_path / "d.png")[..., 0], [[0, 100], [255, 1]])
    wanted = np.array([[False, True], [True, False]])
    for number, array in enumerate((wanted, wanted.astype(np.uint8), wanted * np.uint8(255), wanted * np.uint16(65535))):
        Image.fromarray(array).save(tmp_path / f"{number}.png")
        np.testing.assert_array_equal(decode_mask(tmp_path / f"{number}.png"), wanted)


def test_imagenet_as_kaggle_packs_it(tmp_path):
    data = tmp_path / "ILSVRC/Data/CLS-LOC"
    for name in ("n01440764", "n01443537"):
        save(data / "train" / name / f"{name}_1.JPEG", picture())
    save(data / "val/ILSVRC2012_val_00000001.JPEG", picture())
    write(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC2012_val_00000001,n01443537 1 2 3 4\n")
    assert open_reader("imagenet", tmp_path, "train").keys() == ["n01440764/n01440764_1", "n01443537/n01443537_1"]
    sample = open_reader("imagenet", tmp_path, "val").read("ILSVRC2012_val_00000001")
    assert (sample.label, sample.class_name) == (1, "n01443537")


def test_imagenet_as_the_hubs_parquet(tmp_path):
    pictures = [picture() for _ in range(3)]
    rows = []
    for array in pictures:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "png")
        rows.append({"bytes": buffer.getvalue(), "path": "x.png"})
    table = pa.table({"image": rows, "label": [1, 0, -1]})
    info = {"info": {"features": {"label": {"names": ["tench", "goldfish"]}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data/validation-00000-of-00001.parquet", row_group_size=2)
    reader = open_reader("imagenet", tmp_path, "val")
    keys = reader.keys()
    assert len(keys) == 3
    sample = reader.read(keys[0])
    assert (sample.label, sample.class_name) == (1, "goldfish")
    np.testing.assert_array_equal(sample.images[0], pictures[0])
    with pytest.raises(Exception, match="label -1"):
        reader.read(keys[2])
