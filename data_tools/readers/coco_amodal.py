"""COCO-A (Zhu et al.): amodal polygons on COCO 2014 pictures."""

import json
from pathlib import Path
from typing import Any

from data_tools.readers.regions import AmodalRegions
from dpt.errors import UserError


class COCOAmodal(AmodalRegions):
    name = "coco_amodal"
    files = ("COCO_amodal_{split}2014.json", "annotations/COCO_amodal_{split}2014.json")
    layout = "[annotations/]COCO_amodal_val2014.json and the pictures in val2014/"

    def load(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is no JSON ({error}); fetch it again.") from error
