"""ImageNet as the hub's `datasets` files: data/SPLIT-NNNNN-of-NNNNN.parquet with columns `image` {bytes, path} and `label`."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.readers.base import Reader, Sample, reading
from data_tools.readers.files import read_rgb
from dpt.errors import UserError

_HUB_SPLITS = {"val": "validation"}


def parquet_files(root: Path, split: str) -> list[Path]:
    """The split's files under the root or its folder `data`, in order."""
    names = (split, _HUB_SPLITS.get(split, split))
    return sorted({path for folder in (root, root / "data") for name in names for path in folder.glob(f"{name}-*.parquet")})


class ImageNetParquet(Reader):
    """Keys name a file and a row. The row group that holds a sample is read whole and kept until another is needed."""

    name = "imagenet"
    task = "class"

    def __init__(self, root: Path, files: list[Path]) -> None:
        self.root = root
        self._places: dict[str, tuple[Path, int, int]] = {}
        self._held: tuple[tuple[Path, int] | None, list[dict[str, Any]]] = (None, [])
        for path in files:
            try:
                metadata = pq.read_metadata(path)
                schema = metadata.schema.to_arrow_schema()
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{path} does not read as parquet ({error}); fetch it again.") from error
            if not {"image", "label"} <= set(schema.names):
                raise UserError(f"{path} has the columns {', '.join(schema.names)}; image and label are needed.")
            self.class_names = self.class_names or _class_names(schema)
            number = 0
            for group in range(metadata.num_row_groups):
                for row in range(metadata.row_group(group).num_rows):
                    self._places[f"{path.stem}/{number:06d}"] = (path, group, row)
                    number += 1

    def keys(self) -> list[str]:
        return list(self._places)

    def read(self, key: str) -> Sample:
        path, group, row = self._places[key]
        with reading(key, path):
            if self._held[0] != (path, group):
                with pq.ParquetFile(path) as file:
                    self._held = ((path, group), file.read_row_group(group, columns=["image", "label"]).to_pylist())
            found = self._held[1][row]
            source = f"{path.relative_to(self.root).as_posix()}#{key.rpartition('/')[2]}"
            return labelled(key, found["image"]["bytes"], int(found["label"]), self.class_names, source)


def labelled(key: str, picture: bytes, label: int, class_names: tuple[str, ...], source: str) -> Sample:
    """A picture file with its label. ValueError if it does not decode, or its label is not among the named classes."""
    if label < 0 or (class_names and label >= len(class_names)):
        raise ValueError(f"label {label} is none of the {len(class_names)} classes")
    class_name = class_names[label] if class_names else None
    return Sample(key=key, images=(read_rgb(picture),), label=label, class_name=class_name, meta={"source": source})


def _class_names(schema: pa.Schema) -> tuple[str, ...]:
    """The label names that `datasets` keeps in the file's metadata; empty if it has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
