"""MP3D-Amodal (Zhan et al.): COCO-A's structure as a pickle, both masks as run lengths."""

import pickle
from pathlib import Path
from typing import Any

from data_tools.readers.regions import AmodalRegions
from data_tools.readers.unpickle import load_plain_pickle
from dpt.errors import UserError


class MP3DAmodal(AmodalRegions):
    name = "mp3d_amodal"
    files = ("*{split}*.pkl", "annotations/*{split}*.pkl", "*.pkl", "annotations/*.pkl")
    folders = ("images", "{split}", "")
    layout = "[annotations/]*.pkl and the pictures in images/"

    def load(self, path: Path) -> Any:
        try:
            return load_plain_pickle(path)
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: {error}; only a pickle of plain data is opened.") from error
