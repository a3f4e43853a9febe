"""Each data set in its true layout and file formats, at small size."""

import json
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data_tools.readers import READERS, Excluded, Reader, ReadError, Sample, open_reader
from data_tools.readers.hypersim import distance_to_depth, tone_map
from dpt.errors import UserError

RNG = np.random.default_rng(0)


def picture(height: int = 12, width: int = 16) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_all(reader: Reader) -> dict[str, Sample]:
    keys = reader.keys()
    assert keys == list(dict.fromkeys(keys))
    samples = {key: reader.read(key) for key in keys}
    for key, sample in samples.items():
        assert sample.key == key
        assert isinstance(sample.meta["source"], str)
        json.dumps(sample.meta)
    return samples


# ---------------------------------------------------------------------------------------------------------------- ImageNet
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


# ------------------------------------------------------------------------------------------------------------------- depth
def depth_png(path: Path, depth: np.ndarray, units: float = 1000) -> None:
    save(path, np.rint(depth * units).astype(np.uint16))


DEPTH = RNG.uniform(0.5, 9, (12, 16)).round(3)
DEPTH[0, :3] = 0


def check_depth(sample: Sample, expected: np.ndarray = DEPTH, tolerance: float = 1e-6) -> None:
    assert sample.depth is not None
    np.testing.assert_allclose(sample.depth, expected, atol=tolerance)
    np.testing.assert_array_equal(sample.valid, expected > 0)


@pytest.mark.parametrize("place", ["filename_list_val.txt", "val/filename_list_val.txt", "filename_list_val_filtered.txt"])
def test_hypersim_png(tmp_path: Path, place: str) -> None:
    names = "ai_001_002/rgb_cam_00_fr0003.png", "ai_001_002/depth_plane_cam_00_fr0003.png"
    rgb = picture()
    save(tmp_path / "val" / names[0], rgb)
    depth_png(tmp_path / "val" / names[1], DEPTH)
    write(tmp_path / place, " ".join(names) + "\n\n")
    ((key, sample),) = read_all(open_reader("hypersim", tmp_path, "val")).items()
    assert key == "ai_001_002/rgb_cam_00_fr0003"
    np.testing.assert_array_equal(sample.images[0], rgb)
    check_depth(sample)


def hypersim_frame(root: Path, frame: int, color: np.ndarray, distance: np.ndarray, entity: np.ndarray) -> None:
    for kind, name, array in (
        ("final", "color", color.astype(np.float16)),
        ("geometry", "depth_meters", distance.astype(np.float16)),
        ("geometry", "render_entity_id", entity.astype(np.int32)),
    ):
        path = root / "ai_001_001/images" / f"scene_cam_00_{kind}_hdf5" / f"frame.{frame:04d}.{name}.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file.create_dataset("dataset", data=array)


def test_hypersim_hdf5(tmp_path: Path) -> None:
    height, width = 24, 32
    color = RNG.gamma(1.0, 2.0, (height, width, 3)).astype(np.float16)
    distance = RNG.uniform(1, 90, (height, width)).astype(np.float16)
    entity = np.ones((height, width), int)
    entity[0, :8] = -1
    distance[1, 1] = np.nan
    hypersim_frame(tmp_path, 0, color, distance, entity)
    hypersim_frame(tmp_path, 1, color, np.full((height, width), 2.0), entity * 0 + 1)  # a wall: 0.5 m of range are not there
    hypersim_frame(tmp_path, 2, color * 0 + 1, distance, entity * 0 + 1)  # one grey
    few = entity.copy()
    few[:2] = -1
    hypersim_frame(tmp_path, 3, color, distance, few)
    rows = ["scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"]
    rows += [f"ai_001_001,cam_00,{frame},{public},,{split}" for frame, public, split in
             ((0, "True", "train"), (1, "True", "train"), (2, "True", "train"), (3, "True", "train"), (4, "True", "train"),
              (5, "False", "train"), (6, "True", "val"))]  # fmt: skip
    write(tmp_path / "metadata_images_split_scene_v1.csv", "\n".join(rows))
    reader = open_reader("hypersim", tmp_path, "train")
    assert reader.keys() == [f"ai_001_001/cam_00_fr{frame:04d}" for frame in range(5)]
    sample = reader.read(reader.keys()[0])

    y, x = np.meshgrid(np.arange(height) + 0.5 - height / 2, np.arange(width) + 0.5 - width / 2, indexing="ij")
    focal = 886.81 * width / 1024
    expected = np.minimum(distance.astype(float) * focal / np.sqrt(x**2 + y**2 + focal**2), 65.535)
    expected[(entity == -1) | np.isnan(distance)] = 0
    check_depth(sample, expected, 1e-5)
    assert sample.depth is not None
    assert sample.depth.max() == np.float32(65.535)

    luma = (color.astype(float) * [0.3, 0.59, 0.11]).sum(-1)[entity != -1]
    scaled = color.astype(float) / np.percentile(luma, 90)
    bright = 0.8 * np.clip(scaled, 0, None) ** (1 / 2.2)
    np.testing.assert_allclose(sample.images[0], np.clip(bright, 0, 1) * 255, atol=1.001)

    for key, reason in zip(reader.keys()[1:4], ("depth spans", "colours span", "invalid"), strict=True):
        with pytest.raises(Excluded, match=reason):
            reader.read(key)
        open_reader("hypersim", tmp_path, "train", filtered=False).read(key)
    with pytest.raises(ReadError, match="missing") as caught:
        reader.read(reader.keys()[4])
    assert not isinstance(caught.value, Excluded)


def test_hypersim_formulas_by_hand() -> None:
    one = distance_to_depth(np.full((768, 1024), 2.0))
    corner = 2.0 * 886.81 / np.sqrt(511.5**2 + 383.5**2 + 886.81**2)
    assert one[0, 0] == pytest.approx(corner)
    assert one[383, 511] == pytest.approx(2.0, abs=1e-5)
    grey = np.full((4, 4, 3), 3.0)
    assert (tone_map(grey, np.ones((4, 4), bool)) == int(0.8 * 255)).all()
    assert (tone_map(grey * 1e-6, np.ones((4, 4), bool)) == 0).all()
    assert (tone_map(grey, np.zeros((4, 4), bool)) == 255).all()


def test_nyuv2_png_reads_the_raw_depth_of_each_line(tmp_path: Path) -> None:
    scene = "test/kitchen_0004"
    save(tmp_path / scene / "rgb_0001.png", picture())
    depth_png(tmp_path / scene / "depth_0001.png", DEPTH)
    depth_png(tmp_path / scene / "filled_0001.png", DEPTH + 1)
    write(tmp_path / "lists/mine.txt", f"{scene}/rgb_0001.png {scene}/depth_0001.png {scene}/filled_0001.png\n")
    (sample,) = read_all(open_reader("nyuv2", tmp_path, "test", filename_list="lists/mine.txt")).values()
    check_depth(sample)


def test_nyuv2_mat(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (3, 3, 16, 12), dtype=np.uint8)
    depths = np.stack([DEPTH.T + n * (DEPTH.T > 0) for n in range(3)]).astype(np.float32)
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["rawDepths"] = images, depths
    savemat(tmp_path / "splits.mat", {"trainNdxs": [[1]], "testNdxs": [[2], [3]]})
    samples = read_all(open_reader("nyuv2", tmp_path, "test"))
    assert list(samples) == ["0002", "0003"]
    check_depth(samples["0003"], DEPTH + 2 * (DEPTH > 0))
    np.testing.assert_array_equal(samples["0002"].images[0], images[1].transpose(2, 1, 0))


def test_scannet_brings_colour_to_the_size_of_depth(tmp_path: Path) -> None:
    color = np.full((24, 32, 3), (200, 10, 90), np.uint8)
    lines = []
    for number, size in ((0, color), (100, color[:12, :16])):
        save(tmp_path / f"scene0000_00/color/{number}.jpg", size, quality=100)
        depth_png(tmp_path / f"scene0000_00/depth/{number}.png", DEPTH)
        lines.append(f"scene0000_00/color/{number}.jpg scene0000_00/depth/{number}.png")
    save(tmp_path / "scene0000_00/color/7.jpg", picture(24, 24))
    lines.append("scene0000_00/color/7.jpg scene0000_00/depth/0.png")
    write(tmp_path / "scannet_val_sampled_list_800_1.txt", "\n".join(lines))
    reader = open_reader("scannet", tmp_path, "val")
    for number in (0, 100):
        sample = reader.read(f"scene0000_00/color/{number}")
        assert np.abs(sample.images[0].astype(int) - color[0, 0]).max() <= 3
        check_depth(sample)
    with pytest.raises(ReadError, match="differ in shape"):
        reader.read("scene0000_00/color/7")


def test_kitti_skips_frames_without_truth(tmp_path: Path) -> None:
    drive = "2011_09_26_drive_0002_sync"
    rgb, depth = f"2011_09_26/{drive}/image_02/data/0000000069.png", f"{drive}/proj_depth/groundtruth/image_02/0000000069.png"
    save(tmp_path / rgb, picture())
    depth_png(tmp_path / "val" / depth, DEPTH, 256)
    write(tmp_path / "eigen_test_files_with_gt.txt", f"{rgb} {depth} 721.5377\n2011_09_26/x.png None 721.5377\n")
    (sample,) = read_all(open_reader("kitti", tmp_path, "test")).values()
    check_depth(sample, DEPTH, 1 / 256)


def test_kitti_frames_are_cut_at_the_bottom_in_the_middle(tmp_path: Path) -> None:
    whole = np.arange(375 * 1242).reshape(375, 1242) % 20000 / 256 + 1
    save(tmp_path / "a.png", np.zeros((375, 1242, 3), np.uint8))
    depth_png(tmp_path / "d.png", whole.astype(np.float32), 256)
    write(tmp_path / "eigen_test_files_with_gt.txt", "a.png d.png 721.5377\n")
    sample = open_reader("kitti", tmp_path, "test").read("a")
    assert sample.images[0].shape == (352, 1216, 3)
    np.testing.assert_allclose(sample.depth, whole[375 - 352 :, 13 : 13 + 1216])


@pytest.mark.parametrize("listed", [True, False])
def test_diode(tmp_path: Path, listed: bool) -> None:
    stem = "indoors/scene_00019/scan_00183/00019_00183_indoors_000_010"
    mask = RNG.random(DEPTH.shape) > 0.3
    root = tmp_path if listed else tmp_path / "val"
    save(root / f"{stem}.png", picture())
    np.save(root / f"{stem}_depth.npy", DEPTH[..., None])
    np.save(root / f"{stem}_depth_mask.npy", mask.astype(np.float64))
    if listed:
        write(tmp_path / "diode_val_all_filename_list.txt", f"{stem}.png {stem}_depth.npy {stem}_depth_mask.npy\n")
    ((key, sample),) = read_all(open_reader("diode", tmp_path, "val")).items()
    assert key == stem
    check_depth(sample, np.where(mask, DEPTH, 0))
    np.save(root / f"{stem}_depth.npy", np.array([{"a": 1}], object))
    with pytest.raises(ReadError, match="pickle"):
        open_reader("diode", tmp_path, "val").read(stem)


@pytest.mark.parametrize("listed", [True, False])
def test_eth3d(tmp_path: Path, listed: bool) -> None:
    stored = np.where(DEPTH == 0, np.inf, DEPTH).astype("<f4")
    if listed:
        rgb = "rgb/office/images/dslr_images/DSC_0219.JPG"
        depth = "depth/office_dslr_depth/office/ground_truth_depth/dslr_images/DSC_0219.JPG"
        write(tmp_path / "eth3d_filename_list.txt", f"{rgb} {depth}\n")
    else:
        rgb, depth = "office/images/dslr_images/DSC_0219.JPG", "office/ground_truth_depth/dslr_images/DSC_0219.JPG"
    save(tmp_path / rgb, picture())
    write(tmp_path / depth, stored.tobytes())
    ((key, sample),) = read_all(open_reader("eth3d", tmp_path, "test")).items()
    assert key == rgb.removesuffix(".JPG")
    check_depth(sample)
    write(tmp_path / depth, stored.tobytes()[:-4])
    with pytest.raises(ReadError, match="191 values"):
        open_reader("eth3d", tmp_path, "test").read(key)


# -------------------------------------------------------------------------------------------------------------------- flow
def flo(flow: np.ndarray) -> bytes:
    _, height, width = flow.shape
    return struct.pack("<fii", 202021.25, width, height) + flow.transpose(1, 2, 0).astype("<f4").tobytes()


def chairs(root: Path, numbers: list[int]) -> None:
    for index in range(len(numbers)):
        save(root / "data" / f"{index + 1:05d}_img1.ppm", np.full((6, 8, 3), index, np.uint8))
        save(root / "data" / f"{index + 1:05d}_img2.ppm", picture(6, 8))
        write(root / "data" / f"{index + 1:05d}_flow.flo", flo(np.full((2, 6, 8), index + 0.5)))
    write(root / "FlyingChairs_train_val.txt", "\n".join(map(str, numbers)))


def test_flying_chairs_split_by_line(tmp_path: Path) -> None:
    chairs(tmp_path / "FlyingChairs_release", [1, 2, 1])
    train = read_all(open_reader("flying_chairs", tmp_path / "FlyingChairs_release", "train"))
    assert list(train) == ["00001", "00003"]
    assert open_reader("flying_chairs", tmp_path, "val").keys() == ["00002"]
    sample = train["00003"]
    assert (sample.images[0] == 2).all()
    assert len(sample.images) == 2
    assert sample.flow is not None
    assert (sample.flow == 2.5).all()


def test_unknown_flow_is_invalid(tmp_path: Path) -> None:
    chairs(tmp_path, [1])
    flow = np.ones((2, 6, 8), np.float32)
    flow[0, 0, 0], flow[1, 2, 3] = 1e10, np.nan
    write(tmp_path / "data/00001_flow.flo", flo(flow))
    sample = open_reader("flying_chairs", tmp_path, "train").read("00001")
    assert sample.valid is not None
    assert sample.flow is not None
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


# --------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("name", READERS)
def test_a_wrong_root_is_named_with_the_layout_expected(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UserError) as caught:
            open_reader(name, root, "val" if name not in ("nyuv2", "kitti", "eth3d") else "test")
        assert str(root) in str(caught.value)
        assert "expected" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in READERS if name != "image_folder"])
def test_an_unknown_split_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=r"validation|does not hold"):
        open_reader(name, tmp_path / "set", "validation")


def test_unknown_sets_and_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'nuy'.*nyuv2"):
        open_reader("nuy", tmp_path, "test")
    with pytest.raises(UserError, match=r"'lists'.*filename_list"):
        open_reader("kitti", tmp_path, "test", lists="x")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("00001_img2.ppm", None, "missing"),
        ("00001_img1.ppm", b"P6\n8 6\n255\n\x00", "does not read"),
        ("00001_img1.ppm", b"", "does not read"),
        ("00001_flow.flo", b"nothing", "too few"),
        ("00001_flow.flo", flo(np.zeros((2, 5, 8))), "is expected"),
    ],
)
def test_one_bad_sample_is_named_with_its_file(tmp_path: Path, file: str, content: bytes | None, reason: str) -> None:
    chairs(tmp_path, [1, 1])
    if content is None:
        (tmp_path / "data" / file).unlink()
    else:
        write(tmp_path / "data" / file, content)
    reader = open_reader("flying_chairs", tmp_path, "train")
    with pytest.raises(ReadError, match=reason) as caught:
        reader.read("00001")
    assert caught.value.key == "00001"
    assert caught.value.path.parent == tmp_path / "data"
    assert reader.read("00002").key == "00002"


def test_errors_and_readers_travel_between_processes(tmp_path: Path) -> None:
    chairs(tmp_path, [1])
    reader = pickle.loads(pickle.dumps(open_reader("flying_chairs", tmp_path, "train")))
    assert reader.read("00001").key == "00001"
    error = pickle.loads(pickle.dumps(ReadError("k", Path("p"), "r")))
    assert (error.key, error.path, error.reason) == ("k", Path("p"), "r")


def test_the_example_of_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "readers.md").read_text()
    code = next(block.split("```")[0] for block in page.split("```python\n") if "class MyDepth" in block.split("```")[0])
    module: dict[str, Any] = {}
    exec(code, module)
    monkeypatch.setitem(READERS, "my_depth", module["MyDepth"])
    save(tmp_path / "train/rgb/kitchen/7.jpg", picture())
    (tmp_path / "train/depth/kitchen").mkdir(parents=True)
    np.save(tmp_path / "train/depth/kitchen/7.npy", DEPTH.astype(np.float32))
    samples = read_all(open_reader("my_depth", tmp_path, "train"))
    check_depth(samples["kitchen/7"])
    (tmp_path / "train/depth/kitchen/7.npy").unlink()
    with pytest.raises(ReadError, match="missing"):
        open_reader("my_depth", tmp_path, "train").read("kitchen/7")
    with pytest.raises(UserError, match="expected"):
        open_reader("my_depth", tmp_path, "val")
