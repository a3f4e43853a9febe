"""Amodal sets in COCO-A's structure: parallel `images` and `annotations`, each annotation with `regions`."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.readers.base import Excluded, Reader, Sample, check_split, first_existing, reading, wrong_root
from data_tools.readers.files import mask_image, read_rgb
from data_tools.readers.rle import decode_polygons, decode_rle
from dpt.errors import UserError


class AmodalRegions(Reader):
    """One sample for each object (`isStuff` false) that is partly hidden (it has a `visible_mask`).

    Args:
        root: folder of the set.
        split: one of `splits`.
        annotations: the annotation file, absolute or relative to the root; by default the first of `files` found.
        images: folder of the pictures, likewise; by default the first of `folders` that has a picture.
        occluded_only: leave out objects that nothing hides (their visible mask is the amodal one).
    """

    task = "amodal"
    splits: tuple[str, ...] = ("val", "test", "train")
    files: tuple[str, ...]
    """Patterns of the annotation file under the root; {split} is filled in."""
    folders: tuple[str, ...] = ("images", "{split}2014", "{split}", "")
    """Folders under the root where pictures may be."""
    layout: str

    def __init__(
        self, root: Path | str, split: str, *, annotations: str = "", images: str = "", occluded_only: bool = True
    ) -> None:
        check_split(self.name, split, self.splits)
        self.root = Path(root)
        path = self._find_annotations(annotations, split)
        folders = [images] if images else [folder.format(split=split) for folder in self.folders]
        self._places = [self.root / folder for folder in folders]
        content = self.load(path)
        try:
            self._regions = self._index(content, occluded_only)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise UserError(
                f"{path} is not in COCO-A's structure ({type(error).__name__}: {error}); give another one."
            ) from error

    @abstractmethod
    def load(self, path: Path) -> Any:
        """The annotation file's content.

        Raises:
            UserError: it cannot be loaded.
        """

    def keys(self) -> list[str]:
        return list(self._regions)

    def read(self, key: str) -> Sample:
        file_name, region = self._regions[key]
        path = first_existing(place / file_name for place in self._places) or self._places[0] / file_name
        with reading(key, path):
            rgb = read_rgb(path, upright=False)
            mask = _decode(region["segmentation"], rgb.shape[:2])
            visible = _decode(region["visible_mask"], rgb.shape[:2]) if "visible_mask" in region else mask
            if not visible.any() or not mask.any():
                raise Excluded(key, path, "no pixel of the object is visible")
            meta = {"source": file_name, "region": region.get("name", "")}
            return Sample(key=key, images=(rgb, mask_image(visible)), mask=mask, meta=meta)

    def _find_annotations(self, given: str, split: str) -> Path:
        if given:
            path = self.root / given
            found = [path] if path.is_file() else []
        else:
            patterns = (pattern.format(split=split) for pattern in self.files)
            found = [path for pattern in patterns for path in sorted(self.root.glob(pattern))]
        if not found:
            raise wrong_root(self.name, self.root, self.layout)
        return found[0]

    @staticmethod
    def _index(content: Any, occluded_only: bool) -> dict[str, tuple[str, dict[str, Any]]]:
        """Key -> picture's file name and region. Annotations name their image by id or, without one, by their order."""
        by_id = {image["id"]: image for image in content["images"] if "id" in image}
        regions: dict[str, tuple[str, dict[str, Any]]] = {}
        for number, annotation in enumerate(content["annotations"]):
            image = by_id.get(annotation.get("image_id")) or content["images"][number]
            for index, region in enumerate(annotation["regions"]):
                if region.get("isStuff") or (occluded_only and "visible_mask" not in region):
                    continue
                key = f"{image['file_name'].rpartition('.')[0]}_{index:03d}"
                if key in regions:  # COCO-A lets several people annotate one picture
                    key = f"{key}_{number}"
                regions[key] = (image["file_name"], region)
        return dict(sorted(regions.items()))


def _decode(segmentation: Any, size: tuple[int, ...]) -> NDArray[np.bool_]:
    height, width = size
    return decode_rle(segmentation) if isinstance(segmentation, dict) else decode_polygons(segmentation, height, width)
