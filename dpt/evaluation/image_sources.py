"""Sources of images to compare: a folder of pictures, an .npz, or shards of latents; and stored statistics."""

import dataclasses
import struct
import zipfile
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpt import distributed
from dpt.data.codec import load_vae, mean_latents
from dpt.data.manifest import MANIFEST_NAME
from dpt.data.reader import SampleError
from dpt.data.shards import ShardFolder
from dpt.errors import UserError
from dpt.evaluation.files import write_arrays
from dpt.pictures import read_picture
from dpt.tasks import centre_crop, image_to_uint8
from dpt.urls import is_url

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageSource:
    """Square images uint8 `[H, W, 3]` from a folder (sorted by name, with subfolders), `arr_0` in an .npz, or shards.

    Images of other sizes are brought to `resolution` (0: the first one's short side) as ADM and DiT prepare ImageNet: resize
    the short side, crop the centre. Nothing is stretched. names: only these files of a folder, given by whoever wrote them,
    since a network file system may not list other nodes' files at once. Shards hold latents: their posterior means are
    decoded by `codec` (default: the VAE that the shards name), which keeps the VAE's own loss out of a comparison with a
    model's images.
    """

    def __init__(
        self, path: str | Path, resolution: int = 0, *, names: Sequence[str] = (), codec: Any = None, cache_dir: str = ""
    ) -> None:
        path = Path(path) if not is_url(str(path)) else path
        self.kind = "pictures"
        """"pictures" or "decoded latents"."""
        self.prepared = True
        """Whether all images are of one size by design, as in an .npz or in shards."""
        there: Sized = ()
        self._read: Callable[[Sequence[int]], list[np.ndarray]]
        if not isinstance(path, Path) or (path / MANIFEST_NAME).is_file():
            self.kind = "decoded latents"
            there = shards = _open_shards(str(path), cache_dir)
            self._read = partial(_decode, shards, _shard_codec(shards, codec))
        elif path.is_dir():
            self.prepared = False
            found = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
            there = files = [path / name for name in names] or sorted(found)
            self._read = lambda numbers: [read_picture(files[number]) for number in numbers]
        elif path.suffix == ".npz" and path.is_file() and (array := _npz_array(path, "arr_0")) is not None:
            if array.ndim != 4 or array.dtype != np.uint8 or array.shape[3] != 3:
                raise UserError(f"{path}: arr_0 is {array.dtype} {array.shape}; it must be uint8 [N, H, W, 3].")
            there = images = array
            self._read = lambda numbers: [np.asarray(images[number]) for number in numbers]
        self._size = len(there)
        if not len(self):
            raise UserError(
                f"{path}: no images there; give a folder of pictures, an .npz with arr_0 uint8 [N, H, W, 3], or shards."
            )
        self.resolution = resolution or min(self._read([0])[0].shape[:2])

    def __len__(self) -> int:
        return self._size

    def batch(self, numbers: Sequence[int]) -> np.ndarray:
        """Images uint8 `[B, H, W, 3]` by their numbers."""
        side = (self.resolution, self.resolution)
        images = self._read(numbers)
        return np.stack([image if image.shape[:2] == side else centre_crop(image, self.resolution) for image in images])


def _decode(shards: ShardFolder, codec: Any, numbers: Sequence[int]) -> list[np.ndarray]:
    """Decode latents in shards to images uint8 `[H, W, 3]`."""
    try:
        moments = np.stack([shards[number]["latents"] for number in numbers])
    except SampleError as error:
        raise UserError(f"{error}; encode the set again.") from error
    decoded = codec.decode(mean_latents(torch.from_numpy(moments), codec.scaling))
    return [image_to_uint8(image) for image in decoded.cpu().numpy()]


def _open_shards(path: str, cache_dir: str) -> ShardFolder:
    shards = ShardFolder(path, cache_dir=cache_dir)
    if "latents" not in shards.manifest.members:
        raise UserError(f"{path}: shards for {shards.manifest.task} hold no whole images; give those of a class task.")
    return shards


def _shard_codec(shards: ShardFolder, codec: Any) -> Any:
    """The VAE of the shards' latents: `codec` if it matches. UserError if it cannot be loaded or differs."""
    record = shards.manifest.vae
    if codec is None:
        codec = load_vae(record.name, latent_channels=record.latent_channels).to(distributed.device())
    if difference := codec.record.difference(dataclasses.asdict(record)):
        raise UserError(
            f"{shards.folder}: the latents were made by VAE {record.name!r}, not by the one at hand ({difference}); name that "
            "one."
        )
    return codec


def label_counts(path: str, num_classes: int, cache_dir: str = "") -> list[int]:
    """Count each of `num_classes` labels in class shards. UserError for other labels, or if `path` is no class shards."""
    if not is_url(path) and not (Path(path) / MANIFEST_NAME).is_file():
        raise UserError(f"{path}: shares of the labels are taken from class shards; give those as reference.")
    shards = _open_shards(path, cache_dir)
    counts = [0] * num_classes
    for number in range(len(shards)):
        label = int(shards[number]["label"])
        if not 0 <= label < num_classes:
            raise UserError(f"{path}: sample {number} has label {label}; the weights know classes 0 to {num_classes - 1}.")
        counts[label] += 1
    return counts


def _npz_array(path: Path, name: str) -> np.ndarray | None:
    """An array of an .npz, memory-mapped if stored uncompressed; None if there is none of that name."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type == zipfile.ZIP_STORED:
                with path.open("rb") as file:
                    file.seek(info.header_offset + 26)  # local header: two lengths, then name and extra field
                    file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
                    version = np.lib.format.read_magic(file)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    shape, fortran, dtype = read(file)
                    if not fortran and not dtype.hasobject and all(shape):
                        return np.memmap(path, dtype, "r", file.tell(), shape)
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(
            f"{path}: {name} cannot be read ({error}); give an .npz that numpy.savez wrote, without objects."
        ) from error


def has_images(path: str | Path) -> bool:
    """Whether an .npz holds images."""
    return _npz_array(Path(path), "arr_0") is not None


Normal = tuple[np.ndarray, np.ndarray]
"""Mean `[D]` and covariance `[D, D]` of features, float64."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of a set's features that the figures need and files keep."""

    pooled: Normal
    """`mu` and `sigma` in a file, as in ADM's evaluator."""
    spatial: Normal | None = None
    """Statistics for sFID; `mu_s` and `sigma_s` in a file."""
    features: np.ndarray | None = None
    """Features of single images, float32 `[M, D]`, for precision and recall; only in files that dpt writes."""
    network: str = ""
    """sha256 of the network, only in files that dpt writes; empty: unknown."""
    count: int = 0
    """Number of images; 0: unknown."""
    resolution: int = 0
    """Side of the images in pixels; 0: unknown."""
    inception_score: float | None = None
    """Inception Score; never stored in a file."""


def read_statistics(path: str | Path) -> Statistics | None:
    """Read the statistics in an .npz; None if `path` is something else or holds only images. UserError if inconsistent."""
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return None
    names = ("mu", "sigma", "mu_s", "sigma_s", "features", "network", "count", "resolution")
    found = {name: array for name in names if (array := _npz_array(path, name)) is not None}
    if "mu" not in found:
        return None
    pooled, features = _normal(path, found, "mu", "sigma"), found.get("features")
    if features is not None and (features.ndim != 2 or features.shape[1] != pooled[0].size):
        raise UserError(f"{path}: features is {list(features.shape)}, mu {list(pooled[0].shape)}; give a file of one network.")
    return Statistics(
        pooled=pooled,
        spatial=_normal(path, found, "mu_s", "sigma_s") if "mu_s" in found else None,
        features=None if features is None else np.array(features, dtype=np.float32),
        network=str(found.get("network", "")),
        count=int(found.get("count", 0)),
        resolution=int(found.get("resolution", 0)),
    )


def _normal(path: Path, found: dict[str, np.ndarray], mu: str, sigma: str) -> Normal:
    mean, covariance = found[mu], found.get(sigma)
    if covariance is None or mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        shape = None if covariance is None else list(covariance.shape)
        raise UserError(f"{path}: {mu} is {list(mean.shape)}, {sigma} {shape}; they must be [D] and [D, D].")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: {mu} or {sigma} has values that are not finite; give another file.")
    return np.array(mean, dtype=np.float64), np.array(covariance, dtype=np.float64)


def write_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write an .npz, atomically, readable by `read_statistics` and, where it needs no images, by ADM's evaluator."""
    arrays: dict[str, Any] = dict(zip(("mu", "sigma"), statistics.pooled, strict=True))
    arrays |= {name: getattr(statistics, name) for name in ("network", "count", "resolution")}
    if statistics.spatial is not None:
        arrays |= zip(("mu_s", "sigma_s"), statistics.spatial, strict=True)
    if statistics.features is not None:
        arrays["features"] = statistics.features
    write_arrays(Path(path), arrays)
