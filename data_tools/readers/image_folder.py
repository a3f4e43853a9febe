"""Any folder of pictures, without truth: one class, or as many as it has folders."""

from pathlib import Path

from data_tools.readers.base import Reader, Sample, reading, wrong_root
from data_tools.readers.files import find_images, read_rgb


class ImageFolder(Reader):
    """All pictures under ROOT/SPLIT, or ROOT where that does not exist; the first folder of a path is its class."""

    name = "image_folder"
    task = "class"

    def __init__(self, root: Path | str, split: str) -> None:
        self.root = Path(root) / split if (Path(root) / split).is_dir() else Path(root)
        pictures = [path.relative_to(self.root) for path in find_images(self.root)] if self.root.is_dir() else []
        if not pictures:
            raise wrong_root(self.name, self.root, "pictures (.jpg, .png, ...), in one folder or in many")
        self._pictures: dict[str, Path] = {}
        for path in pictures:  # a.jpg and a.png are two samples
            stem = path.with_suffix("").as_posix()
            self._pictures[stem if stem not in self._pictures else f"{stem}_{path.suffix[1:]}"] = path
        self.class_names = tuple(sorted({_class(path) for path in pictures}))

    def keys(self) -> list[str]:
        return sorted(self._pictures)

    def read(self, key: str) -> Sample:
        relative = self._pictures[key]
        with reading(key, self.root / relative):
            class_name = _class(relative)
            label = self.class_names.index(class_name)
            rgb = read_rgb(self.root / relative)
            return Sample(key=key, images=(rgb,), label=label, class_name=class_name, meta={"source": relative.as_posix()})


def _class(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else "image"
