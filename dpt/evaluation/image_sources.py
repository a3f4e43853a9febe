"""Where images to be compared come from: a folder of pictures, an .npz, or shards of latents; and stored statistics."""

import dataclasses
import struct
import zipfile
from collections.abc import Sequence, Sized
from dataclasses import dataclass
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


class ImageSource(Sequence[np.ndarray]):
    """Images uint8 `[H, W, 3]` of a folder (by name, with subfolders), of `arr_0` in an .npz, or of shards, all square.

    One of another size is brought to `resolution` (0: the first one's short side) as ADM and DiT prepare ImageNet: its short
    side resized, its centre cropped. Nothing is stretched. count: only the first ones; 0: all. Shards hold latents: their
    posterior means are decoded by `codec` (default: the VAE that the shards name), which leaves the VAE's own loss out of a
    comparison with a model's images.
    """

    def __init__(
        self, path: str | Path, resolution: int = 0, *, count: int = 0, codec: Any = None, cache_dir: str = ""
    ) -> None:
        self.path = Path(path)
        self.kind = "pictures"
        """"pictures" or "decoded latents"."""
        self._count = count
        self._array: np.ndarray | None = None
        self._files: list[Path] = []
        self._shards: ShardFolder | None = None
        if is_url(str(path)) or (self.path / MANIFEST_NAME).is_file():
            self.kind = "decoded latents"
            self._shards = _open_shards(str(path), cache_dir)
            self._codec = _shard_codec(self._shards, codec)
        elif self.path.is_dir():
            self._files = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
        elif self.path.suffix == ".npz" and self.path.is_file():
            self._array = _npz_array(self.path, "arr_0")
            if self._array is not None and (
                self._array.ndim != 4 or self._array.dtype != np.uint8 or self._array.shape[3] != 3
            ):
                raise UserError(f"{path}: arr_0 is {self._array.dtype} {self._array.shape}; it must be uint8 [N, H, W, 3].")
        if not len(self):
            raise UserError(
                f"{path}: no images there; give a folder of pictures, an .npz with arr_0 uint8 [N, H, W, 3], or shards."
            )
        self.resolution = resolution or min(self._read([0])[0].shape[:2])

    @property
    def prepared(self) -> bool:
        """Whether the images are all of one size on purpose, as in an .npz or in shards."""
        return self._array is not None or self._shards is not None

    def __len__(self) -> int:
        there: Sized = self._files if self._array is None else self._array
        found = len(self._shards if self._shards is not None else there)
        return min(found, self._count) if self._count else found

    def __getitem__(self, number: Any) -> Any:
        return self.batch([number])[0]

    def batch(self, numbers: Sequence[int]) -> np.ndarray:
        """Images uint8 `[B, H, W, 3]` by their numbers."""
        side = (self.resolution, self.resolution)
        images = self._read(numbers)
        return np.stack([image if image.shape[:2] == side else centre_crop(image, self.resolution) for image in images])

    def _read(self, numbers: Sequence[int]) -> list[np.ndarray]:
        if self._shards is not None:
            try:
                moments = np.stack([self._shards[number]["latents"] for number in numbers])
            except SampleError as error:
                raise UserError(f"{error}; encode the set anew.") from error
            decoded = self._codec.decode(mean_latents(torch.from_numpy(moments), self._codec.scaling))
            return [image_to_uint8(image) for image in decoded.cpu().numpy()]
        if self._array is not None:
            return [np.asarray(self._array[number]) for number in numbers]
        return [read_picture(self._files[number]) for number in numbers]


def _open_shards(path: str, cache_dir: str) -> ShardFolder:
    shards = ShardFolder(path, cache_dir=cache_dir)
    if "latents" not in shards.manifest.members:
        raise UserError(f"{path}: shards for {shards.manifest.task} hold no whole images; give those of a class task.")
    return shards


def _shard_codec(shards: ShardFolder, codec: Any) -> Any:
    """The VAE of the shards' latents: `codec` if it is that one. UserError if it cannot be had."""
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
    """How often each of `num_classes` labels is in class shards. UserError if there are others, or it is something else."""
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
    """An array of an .npz, None if it has none of that name: mapped from the disk where it is stored uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type == zipfile.ZIP_STORED:
                with path.open("rb") as file:
                    file.seek(info.header_offset + 26)  # a local header: two lengths, then a name and an extra field so long
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


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Moments of a reference's features, float64, as ADM's evaluator stores them, and what else a file of them may hold."""

    mean: np.ndarray
    """`[D]`; `mu` in the file."""
    covariance: np.ndarray
    """`[D, D]`; `sigma`."""
    spatial_mean: np.ndarray | None = None
    """`[S]`, for sFID; `mu_s`."""
    spatial_covariance: np.ndarray | None = None
    """`[S, S]`; `sigma_s`."""
    manifold: np.ndarray | None = None
    """float32 `[M, D]`, features of single images for precision and recall; `features`, in files that dpt writes."""
    network: str = ""
    """sha256 of the network, in files that dpt writes; empty: not known."""
    count: int = 0
    """Images; 0: not known."""
    resolution: int = 0
    """Side of the images in pixels; 0: not known."""


def read_statistics(path: str | Path) -> Statistics | None:
    """The statistics in an .npz; None if `path` is something else, or holds only images. UserError if they do not agree."""
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return None
    found = {n: _npz_array(path, n) for n in ("mu", "sigma", "mu_s", "sigma_s", "features", "network", "count", "resolution")}
    if found["mu"] is None:
        return None
    mean, covariance = _moments(path, found, "mu", "sigma")
    spatial = _moments(path, found, "mu_s", "sigma_s") if found["mu_s"] is not None else (None, None)
    manifold = found["features"]
    if manifold is not None and (manifold.ndim != 2 or manifold.shape[1] != mean.size):
        raise UserError(f"{path}: features is {list(manifold.shape)}, mu {list(mean.shape)}; give a file of one network.")
    return Statistics(
        mean=mean,
        covariance=covariance,
        spatial_mean=spatial[0],
        spatial_covariance=spatial[1],
        manifold=None if manifold is None else np.array(manifold, dtype=np.float32),
        network="" if found["network"] is None else str(found["network"]),
        count=0 if found["count"] is None else int(found["count"]),
        resolution=0 if found["resolution"] is None else int(found["resolution"]),
    )


def _moments(path: Path, found: dict[str, np.ndarray | None], mu: str, sigma: str) -> tuple[np.ndarray, np.ndarray]:
    mean, covariance = found[mu], found[sigma]
    assert mean is not None
    if covariance is None or mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        shape = None if covariance is None else list(covariance.shape)
        raise UserError(f"{path}: {mu} is {list(mean.shape)}, {sigma} {shape}; they must be [D] and [D, D].")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: {mu} or {sigma} has values that are not finite; give another file.")
    return np.array(mean, dtype=np.float64), np.array(covariance, dtype=np.float64)


def write_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write them as an .npz that `read_statistics` reads, and ADM's evaluator too where it asks for no images. Atomically."""
    arrays = {
        "mu": statistics.mean,
        "sigma": statistics.covariance,
        "mu_s": statistics.spatial_mean,
        "sigma_s": statistics.spatial_covariance,
        "features": statistics.manifold,
        "network": statistics.network,
        "count": statistics.count,
        "resolution": statistics.resolution,
    }
    write_arrays(Path(path), {name: value for name, value in arrays.items() if value is not None})
