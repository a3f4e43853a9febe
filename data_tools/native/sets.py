"""Write a tiny version of every set that can be read, in its native layout."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from data_tools.native import depth, pictures
from data_tools.readers import SYNTHESIS
from dpt.errors import UserError

WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "coco_amodal": pictures.coco_amodal,
    "diode": depth.diode,
    "eth3d": depth.eth3d,
    "flying_chairs": pictures.flying_chairs,
    "hypersim": depth.hypersim,
    "image_folder": pictures.image_folder,
    "imagenet": pictures.imagenet,
    "kitti": depth.kitti,
    "mp3d_amodal": pictures.mp3d_amodal,
    "nyuv2": depth.nyuv2,
    "pix2gestalt": pictures.pix2gestalt,
    "scannet": depth.scannet,
}
"""Writer of each data set, by its reader's name; called with its root (a folder of that name), the samples of each split and
the seed."""


def write_sets(out: Path, names: Sequence[str] = (), *, samples: int = 4, seed: int = 0) -> list[Path]:
    """Write sets (all, if none is named), each to the folder of its name in `out`; returns those folders.

    The same arguments write the same samples. A set appears under its name once it is complete.

    Raises:
        UserError: an unknown set, a negative seed, or a folder that already holds something.
    """
    names = list(dict.fromkeys(names)) or list(WRITERS)
    for name in names:
        if name not in WRITERS:
            raise UserError(f"data set {name!r} is unknown; choose from {', '.join(WRITERS)}.")
    roots = [out / name for name in names]
    for root in roots:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"{root} exists already; choose another --out, or remove it.")
    partial = out / ".partial"
    for name, root in zip(names, roots, strict=True):
        shutil.rmtree(partial, ignore_errors=True)
        WRITERS[name](partial / name, samples, seed)
        os.replace(partial / name, root)
    partial.rmdir()
    (out / SYNTHESIS).write_text('{"generator": "data_tools.native"}\n', encoding="utf-8")  # recorded in encoded shards
    return roots
