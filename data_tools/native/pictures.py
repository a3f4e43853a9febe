"""Class, flow and amodal sets in their owners' layouts."""

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.native.files import encode_rle, save, write
from data_tools.native.scenes import HEIGHT, WIDTH, scenes, square_scenes
from data_tools.synthesis.layouts import write_lists, write_scene
from data_tools.synthesis.rendering import SceneTruth
from data_tools.synthesis.shapes import CLASS_NAMES


def imagenet(root: Path, samples: int, seed: int) -> None:
    """Kaggle's archive as it unpacks: class folders for training, one folder and a list for validation."""
    pictures = root / "ILSVRC/Data/CLS-LOC"
    for label in range(len(CLASS_NAMES)):
        (pictures / "train" / _wordnet_id(label)).mkdir(parents=True, exist_ok=True)
    for number, truth in enumerate(scenes(seed, "train", samples)):
        name = _wordnet_id(truth.label)
        save(pictures / "train" / name / f"{name}_{number}.JPEG", truth.image, quality=95)
    rows = ["ImageId,PredictionString"]
    for number, truth in enumerate(scenes(seed, "val", samples), start=1):
        stem = f"ILSVRC2012_val_{number:08d}"
        save(pictures / "val" / f"{stem}.JPEG", truth.image, quality=95)
        rows.append(f"{stem},{_wordnet_id(truth.label)} 1 1 {WIDTH} {HEIGHT}")
    write(root / "LOC_val_solution.csv", "\n".join(rows) + "\n")


def image_folder(root: Path, samples: int, seed: int) -> None:
    """Pictures in one folder per class, without splits."""
    for number, truth in enumerate(scenes(seed, "train", samples)):
        save(root / truth.class_name / f"{number}.png", truth.image)


def flying_chairs(root: Path, samples: int, seed: int) -> None:
    """.ppm frames, .flo truth and the split file."""
    _write_task(root, "flow", {split: scenes(seed, split, samples) for split in ("train", "val")})


def pix2gestalt(root: Path, samples: int, seed: int) -> None:
    """Four folders of square PNG, and the names of each split."""
    splits = ("train", "val")
    _write_task(root, "amodal", {split: list(itertools.islice(square_scenes(seed, split), samples)) for split in splits})


def coco_amodal(root: Path, samples: int, seed: int) -> None:
    """COCO 2014 pictures; amodal polygons and compressed visible masks as JSON."""
    for split in ("train", "val"):
        truths = scenes(seed, split, samples)
        names = [f"COCO_{split}2014_{number:012d}.jpg" for number in range(1, len(truths) + 1)]
        for name, truth in zip(names, truths, strict=True):
            save(root / f"{split}2014" / name, truth.image, quality=95)
        content = amodal_annotations(names, [_regions(truth, outline(truth.whole_mask)) for truth in truths])
        write(root / f"annotations/COCO_amodal_{split}2014.json", json.dumps(content))


def mp3d_amodal(root: Path, samples: int, seed: int) -> None:
    """COCO-A's structure as a pickle of plain data, both masks as run lengths."""
    truths = scenes(seed, "test", samples)
    names = [f"{number:06d}.jpg" for number in range(len(truths))]
    for name, truth in zip(names, truths, strict=True):
        save(root / "images" / name, truth.image, quality=95)
    content = amodal_annotations(names, [_regions(truth, encode_rle(truth.whole_mask)) for truth in truths])
    write(root / "mp3d_eval.pkl", pickle.dumps(content, protocol=4))


def amodal_annotations(names: list[str], regions: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """COCO-A's structure: each picture's file name and regions, ids counted from 42."""
    ids = range(42, 42 + len(names))
    images = [{"id": id_, "file_name": name, "height": HEIGHT, "width": WIDTH} for id_, name in zip(ids, names, strict=True)]
    annotations = [{"image_id": id_, "regions": each} for id_, each in zip(ids, regions, strict=True)]
    return {"images": images, "annotations": annotations}


def outline(mask: NDArray[np.bool_]) -> list[float]:
    """The longest outline of bool [H, W] as COCO's polygon [x0, y0, x1, y1, ...], pixel (0, 0) being [0, 1] x [0, 1]."""
    from skimage.measure import find_contours

    contours = find_contours(np.pad(mask, 1).astype(np.float64), 0.5)
    rows, columns = max(contours, key=len)[:-1].T
    return np.stack([columns - 0.5, rows - 0.5], axis=1).ravel().tolist()


def _regions(truth: SceneTruth, whole: Any) -> list[dict[str, Any]]:
    """The hidden object, an object that nothing hides, and stuff (a wall)."""
    corner = [0.0, 0.0, 9.0, 0.0, 9.0, 9.0, 0.0, 9.0]
    visible = encode_rle(truth.visible_mask)
    return [
        {"segmentation": whole, "visible_mask": visible, "isStuff": 0, "name": "hidden", "order": 2},
        {"segmentation": corner, "isStuff": 0, "name": truth.class_name, "order": 1},
        {"segmentation": corner, "visible_mask": visible, "isStuff": 1, "name": "wall", "order": 3},
    ]


def _write_task(root: Path, task: str, truths: dict[str, list[SceneTruth]]) -> None:
    """Scenes in the layout that `data_tools.synthesis` gives a task; its folder is named after the set, as `root` is."""
    members = [(split, truth) for split, truths_of_split in truths.items() for truth in truths_of_split]
    for number, (split, truth) in enumerate(members):
        write_scene(root.parent, (task,), split, number, truth)
    write_lists(root.parent, (task,), {split: len(truths_of_split) for split, truths_of_split in truths.items()})


def _wordnet_id(label: int) -> str:
    return f"n{label + 1440764:08d}"
