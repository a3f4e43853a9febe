"""Depth sets, each as its owners (or the lists that publications share) lay it out."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.native.files import save, save_array, save_depth, save_hdf5, write
from data_tools.native.scenes import HEIGHT, WIDTH, scenes
from data_tools.readers.hypersim import SPLIT_TABLE, distance_to_depth
from data_tools.readers.nyuv2 import LABELED, SPLITS

_CAMERA = "cam_00"
_DRIVE = "2011_09_26_drive_0002_sync"
_UNKNOWN = (slice(0, 1), slice(0, 20))
"""Pixels without truth in every depth map."""


def hypersim(root: Path, samples: int, seed: int) -> None:
    """The owners' HDF5 frames, one scene per split, and their split table."""
    rows = ["scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"]
    entity = np.ones((HEIGHT, WIDTH), np.int32)
    entity[_UNKNOWN] = -1
    for number, split in enumerate(("train", "val", "test"), start=1):
        scene = f"ai_001_{number:03d}"
        for frame, truth in enumerate(scenes(seed, split, samples)):
            distance = truth.depth / distance_to_depth(np.ones((HEIGHT, WIDTH)))
            hypersim_frame(root / scene, frame, (truth.image / 255) ** 2.2, distance, entity)
            rows.append(f"{scene},{_CAMERA},{frame},True,,{split}")
    write(root / SPLIT_TABLE, "\n".join(rows) + "\n")


def hypersim_frame(
    scene: Path, frame: int, color: NDArray[np.floating], distance: NDArray[np.floating], entity: NDArray[np.integer]
) -> None:
    """One raw frame: linear colours [H, W, 3], distances to the camera's centre [H, W] in metres, object ids [H, W]."""
    geometry = scene / "images" / f"scene_{_CAMERA}_geometry_hdf5"
    save_hdf5(
        scene / "images" / f"scene_{_CAMERA}_final_hdf5" / f"frame.{frame:04d}.color.hdf5", dataset=color.astype(np.float16)
    )
    save_hdf5(geometry / f"frame.{frame:04d}.depth_meters.hdf5", dataset=distance.astype(np.float16))
    save_hdf5(geometry / f"frame.{frame:04d}.render_entity_id.hdf5", dataset=entity.astype(np.int32))


def nyuv2(root: Path, samples: int, seed: int) -> None:
    """The owners' two .mat files; train and test take turns."""
    from scipy.io import savemat

    pairs = zip(scenes(seed, "train", samples), scenes(seed, "test", samples), strict=True)
    truths = [truth for pair in pairs for truth in pair]
    save_hdf5(
        root / LABELED,
        images=np.stack([truth.image.transpose(2, 1, 0) for truth in truths]),
        rawDepths=np.stack([_holed(truth.depth).T for truth in truths]),
    )
    numbers = np.arange(1, len(truths) + 1)[:, None]
    savemat(root / SPLITS, {"trainNdxs": numbers[::2], "testNdxs": numbers[1::2]})


def scannet(root: Path, samples: int, seed: int) -> None:
    """Exported frames, colour at twice the size of depth, and the list of the validation frames."""
    lines = []
    for number, truth in enumerate(scenes(seed, "val", samples)):
        color, depth = (f"scene0011_00/{kind}/{100 * number}" for kind in ("color", "depth"))
        larger = Image.fromarray(truth.image).resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC)
        save(root / f"{color}.jpg", np.asarray(larger), quality=95)
        save_depth(root / f"{depth}.png", _holed(truth.depth))
        lines.append(f"{color}.jpg {depth}.png\n")
    write(root / "scannet_val_sampled_list_800_1.txt", "".join(lines))


def eth3d(root: Path, samples: int, seed: int) -> None:
    """DSLR pictures and raw float32 depth, as the archives unpack."""
    for number, truth in enumerate(scenes(seed, "test", samples), start=1):
        name = f"dslr_images/DSC_{number:04d}.JPG"
        save(root / "office/images" / name, truth.image, quality=95)
        depth = truth.depth.astype("<f4")
        depth[_UNKNOWN] = np.inf
        write(root / "office/ground_truth_depth" / name, depth.tobytes())


def diode(root: Path, samples: int, seed: int) -> None:
    """Indoors and outdoors in turn, depth and mask as .npy, without a list."""
    for split in ("train", "val"):
        for number, truth in enumerate(scenes(seed, split, samples)):
            place = ("indoors", "outdoors")[number % 2]
            stem = root / split / place / "scene_00019/scan_00183" / f"00019_00183_{place}_{number:03d}_010"
            mask = np.ones(truth.depth.shape)
            mask[_UNKNOWN] = 0
            save(Path(f"{stem}.png"), truth.image)
            save_array(Path(f"{stem}_depth.npy"), truth.depth[..., None])
            save_array(Path(f"{stem}_depth_mask.npy"), mask)


def kitti(root: Path, samples: int, seed: int) -> None:
    """A raw drive, annotated depth, and the Eigen test list, in which a frame has no truth."""
    lines = [f"2011_09_26/{_DRIVE}/image_02/data/9999999999.png None 721.5377\n"]
    for number, truth in enumerate(scenes(seed, "test", samples)):
        rgb = f"2011_09_26/{_DRIVE}/image_02/data/{number:010d}.png"
        depth = f"{_DRIVE}/proj_depth/groundtruth/image_02/{number:010d}.png"
        save(root / rgb, truth.image)
        save_depth(root / "val" / depth, _holed(truth.depth), 256)
        lines.append(f"{rgb} {depth} 721.5377\n")
    write(root / "eigen_test_files_with_gt.txt", "".join(lines))


def _holed(depth: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy that is 0 where truth is unknown."""
    depth = depth.copy()
    depth[_UNKNOWN] = 0
    return depth
