"""Classes of ImageNet's official validation pictures."""

import csv
from pathlib import Path

from data_tools.readers.files import read_lines
from dpt.errors import UserError

SOLUTION = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12/data"


def validation_classes(root: Path) -> dict[str, str]:
    """Picture (ILSVRC2012_val_NNNNNNNN) -> WordNet id, from Kaggle's list or the development kit in the root.

    Raises:
        UserError: neither exists, or it cannot be read.
    """
    if (root / SOLUTION).is_file():
        with (root / SOLUTION).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"ImageId", "PredictionString"} <= set(rows[0]):
            raise UserError(f"{root / SOLUTION} lacks the columns ImageId and PredictionString; fetch it again.")
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    kit = root / DEVKIT
    if (kit / "meta.mat").is_file():
        return _from_devkit(kit)
    raise UserError(f"{root}: the labels of the validation pictures are missing; put {SOLUTION} or {DEVKIT}/ there.")


def _from_devkit(kit: Path) -> dict[str, str]:
    """meta.mat names the class of each ILSVRC2012 id; line i of the ground truth is the id of picture i, counted from 1."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(kit / "meta.mat", squeeze_me=True)["synsets"]
        wordnet_ids = {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
        ids = [int(line) for line in read_lines(kit / "ILSVRC2012_validation_ground_truth.txt")]
        return {f"ILSVRC2012_val_{number:08d}": wordnet_ids[id_] for number, id_ in enumerate(ids, start=1)}
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"{kit} does not read as ImageNet's development kit ({error}); unpack it again.") from error
