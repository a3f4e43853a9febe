"""Depth sets in layouts and with values that the native sets (`tests/data_tools/native`) do not have."""

from pathlib import Path

import numpy as np
import pytest

from data_tools.native.depth import hypersim_frame
from data_tools.native.files import save, save_depth, write
from data_tools.readers import Excluded, ReadError, open_reader
from data_tools.readers.hypersim import distance_to_depth, tone_map
from tests.data_tools.readers.reader_layouts import DEPTH, RNG, check_depth, picture, read_all


@pytest.mark.parametrize("place", ["filename_list_val.txt", "val/filename_list_val.txt", "filename_list_val_filtered.txt"])
def test_hypersim_png(tmp_path: Path, place: str) -> None:
    names = "ai_001_002/rgb_cam_00_fr0003.png", "ai_001_002/depth_plane_cam_00_fr0003.png"
    rgb = picture()
    save(tmp_path / "val" / names[0], rgb)
    save_depth(tmp_path / "val" / names[1], DEPTH)
    write(tmp_path / place, " ".join(names) + "\n\n")
    ((key, sample),) = read_all(open_reader("hypersim", tmp_path, "val")).items()
    assert key == "ai_001_002/rgb_cam_00_fr0003"
    np.testing.assert_array_equal(sample.images[0], rgb)
    check_depth(sample)


def test_hypersim_hdf5(tmp_path: Path) -> None:
    height, width = 24, 32
    color = RNG.gamma(1.0, 2.0, (height, width, 3)).astype(np.float16)
    distance = RNG.uniform(1, 90, (height, width)).astype(np.float16)
    entity = np.ones((height, width), int)
    entity[0, :8] = -1
    distance[1, 1] = np.nan
    hypersim_frame(tmp_path / "ai_001_001", 0, color, distance, entity)
    hypersim_frame(
        tmp_path / "ai_001_001", 1, color, np.full((height, width), 2.0), entity * 0 + 1
    )  # a wall: 0.5 m of range are not there
    hypersim_frame(tmp_path / "ai_001_001", 2, color * 0 + 1, distance, entity * 0 + 1)  # one grey
    few = entity.copy()
    few[:2] = -1
    hypersim_frame(tmp_path / "ai_001_001", 3, color, distance, few)
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
    save_depth(tmp_path / scene / "depth_0001.png", DEPTH)
    save_depth(tmp_path / scene / "filled_0001.png", DEPTH + 1)
    write(tmp_path / "lists/mine.txt", f"{scene}/rgb_0001.png {scene}/depth_0001.png {scene}/filled_0001.png\n")
    (sample,) = read_all(open_reader("nyuv2", tmp_path, "test", filename_list="lists/mine.txt")).values()
    check_depth(sample)


def test_scannet_brings_colour_to_the_size_of_depth(tmp_path: Path) -> None:
    color = np.full((24, 32, 3), (200, 10, 90), np.uint8)
    lines = []
    for number, size in ((0, color), (100, color[:12, :16])):
        save(tmp_path / f"scene0000_00/color/{number}.jpg", size, quality=100)
        save_depth(tmp_path / f"scene0000_00/depth/{number}.png", DEPTH)
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


def test_kitti_frames_are_cut_at_the_bottom_in_the_middle(tmp_path: Path) -> None:
    whole = np.arange(375 * 1242).reshape(375, 1242) % 20000 / 256 + 1
    save(tmp_path / "a.png", np.zeros((375, 1242, 3), np.uint8))
    save_depth(tmp_path / "d.png", whole.astype(np.float32), 256)
    write(tmp_path / "eigen_test_files_with_gt.txt", "a.png d.png 721.5377\n")
    sample = open_reader("kitti", tmp_path, "test").read("a")
    assert sample.images[0].shape == (352, 1216, 3)
    np.testing.assert_allclose(sample.depth, whole[375 - 352 :, 13 : 13 + 1216])


def test_diode_by_its_list(tmp_path: Path) -> None:
    stem = "indoors/scene_00019/scan_00183/00019_00183_indoors_000_010"
    mask, root = RNG.random(DEPTH.shape) > 0.3, tmp_path
    save(root / f"{stem}.png", picture())
    np.save(root / f"{stem}_depth.npy", DEPTH[..., None])
    np.save(root / f"{stem}_depth_mask.npy", mask.astype(np.float64))
    write(root / "diode_val_all_filename_list.txt", f"{stem}.png {stem}_depth.npy {stem}_depth_mask.npy\n")
    ((key, sample),) = read_all(open_reader("diode", tmp_path, "val")).items()
    assert key == stem
    check_depth(sample, np.where(mask, DEPTH, 0))
    np.save(root / f"{stem}_depth.npy", np.array([{"a": 1}], object))
    with pytest.raises(ReadError, match="pickle"):
        open_reader("diode", tmp_path, "val").read(stem)


def test_eth3d_by_its_list(tmp_path: Path) -> None:
    stored = np.where(DEPTH == 0, np.inf, DEPTH).astype("<f4")
    rgb = "rgb/office/images/dslr_images/DSC_0219.JPG"
    depth = "depth/office_dslr_depth/office/ground_truth_depth/dslr_images/DSC_0219.JPG"
    write(tmp_path / "eth3d_filename_list.txt", f"{rgb} {depth}\n")
    save(tmp_path / rgb, picture())
    write(tmp_path / depth, stored.tobytes())
    ((key, sample),) = read_all(open_reader("eth3d", tmp_path, "test")).items()
    assert key == rgb.removesuffix(".JPG")
    check_depth(sample)
    write(tmp_path / depth, stored.tobytes()[:-4])
    with pytest.raises(ReadError, match="191 values"):
        open_reader("eth3d", tmp_path, "test").read(key)
