"""Class sets in their true layouts and file formats, at small size."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat

from data_tools.native.files import save, write
from data_tools.readers import ReadError, open_reader
from dpt.errors import UserError
from tests.data_tools.readers.reader_layouts import picture, read_all

IDS = ("n01440764", "n01443537")


def test_imagenet_class_folders(tmp_path: Path) -> None:
    for split, names in (("train", IDS), ("val", IDS[1:])):
        for name in names:
            save(tmp_path / split / name / f"{name}_7.JPEG", picture(), quality=95)
    save(tmp_path / "train" / IDS[0] / f"{IDS[0]}_8.JPEG", picture()[..., 0])  # grey, as some are
    train = read_all(open_reader("imagenet", tmp_path, "train"))
    assert [(key, sample.label) for key, sample in train.items()] == [
        (f"{IDS[0]}/{IDS[0]}_7", 0), (f"{IDS[0]}/{IDS[0]}_8", 0), (f"{IDS[1]}/{IDS[1]}_7", 1)
    ]  # fmt: skip
    reader = open_reader("imagenet", tmp_path, "val")
    assert reader.class_names == IDS
    (sample,) = read_all(reader).values()
    assert (sample.label, sample.class_name) == (1, IDS[1])  # numbered as in train, though val lacks a class


def test_imagenet_val_with_a_class_that_train_lacks_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "train" / "a" / "1.png", picture())
    save(tmp_path / "val" / "b" / "1.png", picture())
    with pytest.raises(UserError, match="'b'"):
        open_reader("imagenet", tmp_path, "val")


def _make_tar(path: Path, files: dict[str, Path]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, file in files.items():
            tar.add(file, name)
    return path


def test_imagenet_official_tars(tmp_path: Path) -> None:
    pictures = {name: save(tmp_path / "loose" / f"{name}_1.JPEG", picture()) for name in IDS}
    separate, packed = tmp_path / "separate", tmp_path / "packed"
    tars = {name: _make_tar(separate / "train" / f"{name}.tar", {f"{name}_1.JPEG": pictures[name]}) for name in IDS}
    _make_tar(packed / "ILSVRC2012_img_train.tar", {f"{name}.tar": tar for name, tar in tars.items()})
    validation = {f"ILSVRC2012_val_{number:08d}.JPEG": pictures[name] for number, name in ((1, IDS[1]), (2, IDS[0]))}
    _make_tar(packed / "ILSVRC2012_img_val.tar", validation)
    folders = [read_all(open_reader("imagenet", root, "train")) for root in (separate, packed)]
    for samples in folders:
        assert [(key, sample.label) for key, sample in samples.items()] == [
            (f"{name}/{name}_1", i) for i, name in enumerate(IDS)
        ]
    np.testing.assert_array_equal(folders[0][f"{IDS[1]}/{IDS[1]}_1"].images[0], folders[1][f"{IDS[1]}/{IDS[1]}_1"].images[0])

    with pytest.raises(UserError, match=r"LOC_val_solution\.csv"):
        open_reader("imagenet", packed, "val")
    kit = packed / "ILSVRC2012_devkit_t12/data"
    write(kit / "ILSVRC2012_validation_ground_truth.txt", "7\n3\n")
    synsets = np.array([(7, IDS[1]), (3, IDS[0])], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    savemat(kit / "meta.mat", {"synsets": synsets})
    by_kit = read_all(open_reader("imagenet", packed, "val"))
    rows = [f"ILSVRC2012_val_00000002,{IDS[0]} 1 2 3 4", f"ILSVRC2012_val_00000001,{IDS[1]} 1 2 3 4 "]
    write(packed / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows]))
    for samples in (by_kit, read_all(open_reader("imagenet", packed, "val"))):
        labels = {key: sample.label for key, sample in samples.items()}
        assert labels == {"ILSVRC2012_val_00000001": 1, "ILSVRC2012_val_00000002": 0}


def test_imagenet_unpacked_official_validation(tmp_path: Path) -> None:
    save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", picture())
    write(tmp_path / "LOC_val_solution.csv", f"ImageId,PredictionString\nILSVRC2012_val_00000001,{IDS[0]} 1 2 3 4\n")
    assert read_all(open_reader("imagenet", tmp_path, "val"))["ILSVRC2012_val_00000001"].class_name == IDS[0]


def test_imagenet_webdataset(tmp_path: Path) -> None:
    first, bad_label = save(tmp_path / "loose/1.jpg", picture()), write(tmp_path / "loose/bad.cls", "9")
    label = write(tmp_path / "loose/1.cls", "1")
    members = {
        "0001.cls": label,
        "0001.jpg": first,
        "0001.json": label,
        "0002.jpg": first,
        "0003.jpg": first,
        "0003.cls": bad_label,
    }
    _make_tar(tmp_path / "set" / "imagenet1k-train-0000.tar", members)
    write(tmp_path / "set" / "class_names.txt", "tench\ngoldfish\n")
    reader = open_reader("imagenet", tmp_path / "set", "train")
    assert reader.class_names == ("tench", "goldfish")
    assert len(reader.keys()) == 3
    sample = reader.read("imagenet1k-train-0000/0001")
    assert (sample.label, sample.class_name) == (1, "goldfish")
    for key, reason in (("0002", "cls"), ("0003", "label 9")):
        with pytest.raises(ReadError, match=reason):
            reader.read(f"imagenet1k-train-0000/{key}")


def test_image_folder(tmp_path: Path) -> None:
    save(tmp_path / "flat" / "a.jpg", picture())
    save(tmp_path / "flat" / "a.png", picture())
    assert {sample.label for sample in read_all(open_reader("image_folder", tmp_path / "flat", "train")).values()} == {0}
    assert open_reader("image_folder", tmp_path / "flat", "train").keys() == ["a", "a_png"]
    save(tmp_path / "deep" / "train" / "cats" / "x" / "1.png", picture())
    save(tmp_path / "deep" / "train" / "dogs" / "1.webp", picture())
    samples = read_all(open_reader("image_folder", tmp_path / "deep", "train"))
    assert {key: sample.class_name for key, sample in samples.items()} == {"cats/x/1": "cats", "dogs/1": "dogs"}


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
    with pytest.raises(ReadError, match="label -1"):
        reader.read(keys[2])
