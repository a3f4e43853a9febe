"""pix2gestalt's synthetic occlusions: four folders of 256 x 256 PNG."""

from pathlib import Path

from data_tools.readers.base import Reader, Sample, check_split, reading, wrong_root
from data_tools.readers.files import mask_image, read_lines, read_rgb
from dpt.pictures import decode_mask

_SUFFIXES = {"occlusion": "occlusion", "whole": "whole", "whole_mask": "whole_mask", "visible_object_mask": "visible_mask"}
"""Suffix of the file names in each folder."""


class Pix2Gestalt(Reader):
    """occlusion/X_occlusion.png, whole/X_whole.png, whole_mask/X_whole_mask.png, visible_object_mask/X_visible_mask.png.

    Args:
        root: the folder that holds the four.
        split: the names in SPLIT.txt in the root, if it exists; otherwise val is the last hundredth in the order of file
            names, train the rest.
    """

    name = "pix2gestalt"
    task = "amodal"

    def __init__(self, root: Path | str, split: str) -> None:
        check_split(self.name, split, ("train", "val", "test"))
        self.root = Path(root)
        files = sorted(path.name for path in (self.root / "occlusion").glob("*_occlusion.png"))
        names = [file.removesuffix("_occlusion.png") for file in files]
        if not names or not all((self.root / folder).is_dir() for folder in _SUFFIXES):
            raise wrong_root(self.name, self.root, "the folders " + ", ".join(f"{name}/" for name in _SUFFIXES))
        split_file = self.root / f"{split}.txt"
        if split_file.is_file():
            self._keys = read_lines(split_file)
        else:
            check_split(self.name, split, ("train", "val"))
            first_held_out = len(names) * 99 // 100
            self._keys = names[first_held_out:] if split == "val" else names[:first_held_out]

    def keys(self) -> list[str]:
        return list(self._keys)

    def read(self, key: str) -> Sample:
        paths = {folder: self.root / folder / f"{key}_{suffix}.png" for folder, suffix in _SUFFIXES.items()}
        with reading(key, paths["occlusion"]):
            rgb = read_rgb(paths["occlusion"], upright=False)
        with reading(key, paths["whole"]):
            whole = read_rgb(paths["whole"], upright=False)
        with reading(key, paths["visible_object_mask"]):
            visible = decode_mask(paths["visible_object_mask"], upright=False)
        with reading(key, paths["whole_mask"]):
            mask = decode_mask(paths["whole_mask"], upright=False)
            source = f"occlusion/{key}_occlusion.png"
            return Sample(key=key, images=(rgb, mask_image(visible)), mask=mask, whole=whole, meta={"source": source})
