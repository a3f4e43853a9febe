"""ImageNet-1K (and any set of class folders): folders, the official tars, and WebDataset tars."""

import re
from pathlib import Path

from data_tools.readers.base import Reader, Sample, check_split, reading, wrong_root
from data_tools.readers.files import IMAGE_SUFFIXES, find_images, read_lines, read_rgb
from data_tools.readers.imagenet_labels import validation_classes
from data_tools.readers.imagenet_parquet import ImageNetParquet, labelled, parquet_files
from data_tools.readers.tars import TarMember, list_members
from dpt.errors import UserError

_SPLITS = ("train", "val", "test")
_CLASS_TAR = re.compile(r"n\d{8}\.tar")
LAYOUT = (
    "SPLIT/CLASS/*.JPEG, SPLIT/nNNNNNNNN.tar, ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar (or val/*.JPEG) with "
    "LOC_val_solution.csv or the devkit, ILSVRC/Data/CLS-LOC/SPLIT, data/SPLIT-*.parquet, or WebDataset tars *SPLIT*.tar"
)
Entry = tuple[str, Path | TarMember]
"""Class and location of a picture."""


class ImageNet(Reader):
    """Pictures whose class is the folder or the tar they are in, or (official val) comes from a list.

    Labels number the sorted class names: those of `train` where it exists, so that splits agree.
    """

    name = "imagenet"
    task = "class"

    def __init__(self, root: Path | str, split: str) -> None:
        check_split(self.name, split, _SPLITS)
        self.root = _pictures_root(Path(root), split)
        self._entries = _entries(self.root, split, labels_root=Path(root))
        if not self._entries:
            raise wrong_root(self.name, self.root, LAYOUT)
        present = {class_name for class_name, _ in self._entries.values()}
        trained = _classes(self.root / "train") or present
        if not present <= trained:
            raise UserError(f"{self.root}: {split} has classes that train lacks, such as {min(present - trained)!r}; add them.")
        self.class_names = tuple(sorted(trained))
        self._labels = {class_name: label for label, class_name in enumerate(self.class_names)}

    def keys(self) -> list[str]:
        return sorted(self._entries)

    def read(self, key: str) -> Sample:
        class_name, place = self._entries[key]
        path = place.tar / place.name if isinstance(place, TarMember) else place
        with reading(key, path):
            rgb = read_rgb(place.read() if isinstance(place, TarMember) else place)
            label, source = self._labels[class_name], path.relative_to(self.root).as_posix()
            return Sample(key=key, images=(rgb,), label=label, class_name=class_name, meta={"source": source})


class ImageNetWebDataset(Reader):
    """Tars of KEY.jpg (or .jpeg, .png) beside KEY.cls, a label in digits.

    class_names.txt in the root, if it exists, gives the names in label order.
    """

    name = "imagenet"
    task = "class"

    def __init__(self, root: Path | str, split: str, tars: list[Path]) -> None:
        self.root = Path(root)
        names = self.root / "class_names.txt"
        self.class_names = tuple(read_lines(names)) if names.is_file() else ()
        self._pairs: dict[str, dict[str, TarMember]] = {}
        for tar in tars:
            for member in list_members(tar):
                stem, _, suffix = member.name.removeprefix("./").partition(".")
                kind = "image" if f".{suffix.lower()}" in IMAGE_SUFFIXES else suffix
                self._pairs.setdefault(f"{tar.stem}/{stem}", {})[kind] = member
        self._pairs = {key: pair for key, pair in self._pairs.items() if "image" in pair}

    def keys(self) -> list[str]:
        return list(self._pairs)

    def read(self, key: str) -> Sample:
        pair = self._pairs[key]
        path = pair["image"].tar / pair["image"].name
        with reading(key, path):
            if "cls" not in pair:
                raise ValueError("its label, KEY.cls, is missing")
            source = path.relative_to(self.root).as_posix()
            return labelled(key, pair["image"].read(), int(pair["cls"].read()), self.class_names, source)


def _classes(folder: Path) -> set[str]:
    """Names of class folders or class tars."""
    if not folder.is_dir():
        return set()
    return {path.stem for path in folder.iterdir() if path.is_dir() or _CLASS_TAR.fullmatch(path.name)}


def _pictures_root(root: Path, split: str) -> Path:
    """The folder that holds the split: the root, or where Kaggle's archive keeps it."""
    places = (root, root / "ILSVRC/Data/CLS-LOC", root / "Data/CLS-LOC")
    return next((place for place in places if (place / split).is_dir()), root)


def _entries(root: Path, split: str, labels_root: Path) -> dict[str, Entry]:
    folder = root / split
    if any(folder.glob("*/")):
        pictures = {path.relative_to(folder): path for path in find_images(folder) if path.parent != folder}
        return {_key(path): (path.parts[0], place) for path, place in pictures.items()}
    tars = sorted(path for path in folder.glob("*.tar") if _CLASS_TAR.fullmatch(path.name))
    if tars:
        return {f"{tar.stem}/{_key(Path(member.name))}": (tar.stem, member) for tar in tars for member in list_members(tar)}
    if split == "train" and (root / "ILSVRC2012_img_train.tar").is_file():
        members = list_members(root / "ILSVRC2012_img_train.tar")
        return {_key(Path(member.name)): (Path(member.name).parts[0], member) for member in members}
    if split == "val":
        return _official_validation(root, labels_root)
    return {}


def _official_validation(root: Path, labels_root: Path) -> dict[str, Entry]:
    """ILSVRC2012_val_NNNNNNNN.JPEG, packed or unpacked, all in one folder."""
    tar, folder = root / "ILSVRC2012_img_val.tar", root / "val"
    pictures: list[tuple[str, Path | TarMember]] = []
    if tar.is_file():
        pictures = [(Path(member.name).stem, member) for member in list_members(tar)]
    elif folder.is_dir():
        pictures = [(path.stem, path) for path in sorted(folder.glob("*.JPEG"))]
    if not pictures:
        return {}
    classes = validation_classes(labels_root)
    if unknown := [name for name, _ in pictures if name not in classes]:
        raise UserError(f"{root}: the validation labels do not name {unknown[0]}; take the official list.")
    return {name: (classes[name], place) for name, place in pictures}


def _key(path: Path) -> str:
    return path.with_suffix("").as_posix()


def open_imagenet(root: Path | str, split: str) -> Reader:
    """Class folders or official tars, or the hub's parquet files; WebDataset tars where neither is found."""
    check_split("imagenet", split, _SPLITS)
    root = Path(root)
    parquet, has_folders = parquet_files(root, split), any((root / split).glob("*/"))
    if parquet and _pictures_root(root, split) == root and not has_folders:
        return ImageNetParquet(root, parquet)
    candidates = sorted({*(root / split).glob("*.tar"), *root.glob(f"*{split}*.tar")})
    tars = [path for path in candidates if not _CLASS_TAR.fullmatch(path.name) and not path.name.startswith("ILSVRC2012_img_")]
    if tars and not has_folders:
        return ImageNetWebDataset(root, split, tars)
    return ImageNet(root, split)
