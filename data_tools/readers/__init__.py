"""Readers of the data sets, each as its owners publish it. Adding a set takes one file and one line here (docs/readers.md)."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from data_tools.readers.base import SYNTHESIS, Excluded, Reader, ReadError, Sample, is_synthetic
from data_tools.readers.coco_amodal import COCOAmodal
from data_tools.readers.diode import DIODE
from data_tools.readers.eth3d import ETH3D
from data_tools.readers.flying_chairs import FlyingChairs
from data_tools.readers.hypersim import open_hypersim
from data_tools.readers.image_folder import ImageFolder
from data_tools.readers.imagenet import open_imagenet
from data_tools.readers.kitti import KITTI
from data_tools.readers.mp3d_amodal import MP3DAmodal
from data_tools.readers.nyuv2 import open_nyuv2
from data_tools.readers.pix2gestalt import Pix2Gestalt
from data_tools.readers.scannet import ScanNet
from dpt.errors import UserError

__all__ = [
    "READERS",
    "SYNTHESIS",
    "Excluded",
    "ReadError",
    "Reader",
    "Sample",
    "changed_options",
    "is_synthetic",
    "open_reader",
    "parse_options",
    "register_reader",
]

READERS: dict[str, Callable[..., Reader]] = {
    "coco_amodal": COCOAmodal,
    "diode": DIODE,
    "eth3d": ETH3D,
    "flying_chairs": FlyingChairs,
    "hypersim": open_hypersim,
    "image_folder": ImageFolder,
    "imagenet": open_imagenet,
    "kitti": KITTI,
    "mp3d_amodal": MP3DAmodal,
    "nyuv2": open_nyuv2,
    "pix2gestalt": Pix2Gestalt,
    "scannet": ScanNet,
}
"""Opener of each data set, called with root, split and the set's own options by name."""


def register_reader(name: str, opener: Callable[..., Reader]) -> None:
    """Add a data set: `opener(root, split, **options)` returns its reader. UserError if the name is taken."""
    if name in READERS:
        raise UserError(f"data set {name!r} already exists; choose another name.")
    READERS[name] = opener


def open_reader(name: str, root: Path | str, split: str, **options: Any) -> Reader:
    """Open one split of a data set that lies in `root`.

    Raises:
        UserError: an unknown set, split or option, or a root that does not hold the set.
    """
    _check_options(name, options)
    return READERS[name](Path(root), split, **options)


def parse_options(name: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Options of the reader `name` from text, each converted to its type in the reader's signature.

    Raises:
        UserError: an unknown set or option, or text that is not a value of its type.
    """
    _check_options(name, texts)
    opener = READERS[name]
    hints = get_type_hints(opener.__init__ if inspect.isclass(opener) else opener)
    return {option: _parsed(name, option, text, hints[option]) for option, text in texts.items()}


def changed_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the reader's parsed `options` that differ from its defaults, by name in alphabetical order."""
    parameters = inspect.signature(READERS[name]).parameters
    return {option: value for option, value in sorted(options.items()) if value != parameters[option].default}


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    if name not in READERS:
        raise UserError(f"data set {name!r} is unknown; choose one of {', '.join(READERS)}.")
    known = [option for option in inspect.signature(READERS[name]).parameters if option not in ("root", "split")]
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option {option!r}; it has {', '.join(known) or 'none'}.")


def _parsed(name: str, option: str, text: str, kind: Any) -> Any:
    choices = get_args(kind) if get_origin(kind) is Literal else ("true", "false") if kind is bool else ()
    if choices:
        found = next((choice for choice in choices if str(choice).lower() == text.lower()), None)
        if found is None:
            raise UserError(f"{name}: option {option} is {text!r}; choose one of {', '.join(map(str, choices))}.")
        return found == "true" if kind is bool else found
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{name}: option {option} is {text!r}; it takes a {kind.__name__}.") from None
