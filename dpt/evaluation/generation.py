"""Class-conditional images in numbers: Frechet distance, precision and recall of generated against real images.

The feature network is a TorchScript file that the user gives: its weights cannot be bundled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpt import distributed
from dpt.errors import UserError
from dpt.evaluation.prediction import Predictor
from dpt.pictures import read_picture
from dpt.progress import progress
from dpt.tasks import centre_crop

INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
"""TorchScript of the Inception-v3 that published FIDs are measured with."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_ROWS = 2048


def evaluate_images(
    samples: str | Path, reference: str | Path, *, features: str | Path, batch_size: int = 64, neighbours: int = 3
) -> dict[str, float]:
    """{"fid", "precision", "recall", "num_samples", "num_reference"} of generated images against real ones, on every rank.

    samples, reference: a folder of images, or an .npz with `arr_0` uint8 `[N, H, W, 3]` (a reference may hold only `mu` `[D]`
    and `sigma` `[D, D]` of its features: then fid alone). features: TorchScript file; see `load_features`. Images are dealt to
    the ranks by number and their features put back in order, so the figures do not depend on how many ranks there are.
    Pictures of another size than the first sample's are brought to it as training images are: see `ImageSource`.
    """
    network = load_features(features)
    resolution = ImageSource(Path(samples)).resolution
    generated = image_features(samples, network, batch_size, resolution)
    known = _stored_moments(Path(reference))
    real = (
        None
        if known is not None and not _has_images(Path(reference))
        else image_features(reference, network, batch_size, resolution)
    )
    moments = known if known is not None else _moments(real)
    result = {"fid": frechet_distance(*_moments(generated), *moments), "num_samples": float(len(generated))}
    if real is not None:
        precision, recall = precision_recall(real, generated, neighbours)
        result |= {"precision": precision, "recall": recall, "num_reference": float(len(real))}
    return result


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """uint8 images `[B, 3, H, W]` -> features `[B, D]`."""

    module: Any
    arguments: dict[str, Any]
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        found = self.module(images.to(self.device), **self.arguments)
        if not isinstance(found, Tensor) or found.ndim != 2:
            raise UserError("the feature network does not turn images into vectors [B, D]; give another one.")
        return found.float().cpu()


def load_features(path: str | Path) -> FeatureNetwork:
    """The feature network in a TorchScript file that takes uint8 `[B, 3, H, W]`, such as StyleGAN's Inception-v3.

    UserError if there is none: it says what to fetch.
    """
    if not path or not Path(path).is_file():
        raise UserError(f"there is no feature network {str(path)!r}; fetch the TorchScript file {INCEPTION} and name its path.")
    device = distributed.device()
    try:
        module = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{path}: no TorchScript file ({str(error).splitlines()[0]}); fetch {INCEPTION}.") from error
    names = [a.name for a in module.forward.schema.arguments]
    arguments = {"return_features": True} if "return_features" in names else {}
    return FeatureNetwork(module=module, arguments=arguments, device=device)


def image_features(source: str | Path, network: FeatureNetwork, batch_size: int, resolution: int = 0) -> np.ndarray:
    """Features float32 `[N, D]` of the images in a folder or .npz, in order, on every rank. UserError if there are none."""
    images = ImageSource(Path(source), resolution)
    numbers = range(distributed.rank(), len(images), distributed.world_size())
    found: list[np.ndarray] = []
    with progress(numbers, f"features of {Path(source).name}", "image") as bar:
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            batch = np.stack([images[i] for i in part])
            found.append(network(torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()).numpy())
            bar.update(len(part))
    gathered = distributed.gather_objects(np.concatenate(found) if found else None)
    width = next(g.shape[1] for g in gathered if g is not None)
    features = np.empty((len(images), width), dtype=np.float32)
    for rank, part_of_rank in enumerate(gathered):
        if part_of_rank is not None:
            features[rank :: len(gathered)] = part_of_rank
    return features


class ImageSource(Sequence[np.ndarray]):
    """Images uint8 `[H, W, 3]` of a folder (by name, with subfolders) or of `arr_0` in an .npz, all square.

    One of another size is brought to `resolution` (0: the first one's short side) as ADM and DiT prepare ImageNet: its short
    side resized, its centre cropped. Nothing is stretched.
    """

    def __init__(self, path: Path, resolution: int = 0) -> None:
        self._path = path
        self._array: np.ndarray | None = None
        self._files: list[Path] = []
        if path.is_dir():
            self._files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.suffix == ".npz" and path.is_file():
            with np.load(path, allow_pickle=False) as arrays:
                self._array = arrays.get("arr_0")
            if self._array is not None and (self._array.ndim != 4 or self._array.dtype != np.uint8):
                raise UserError(f"{path}: arr_0 is {self._array.dtype} {self._array.shape}; it must be uint8 [N, H, W, 3].")
        if not len(self):
            raise UserError(f"{path}: no images there; give a folder of pictures, or an .npz with arr_0 uint8 [N, H, W, 3].")
        self.resolution = resolution or min(self._read(0).shape[:2])

    def __len__(self) -> int:
        return len(self._files) if self._array is None else len(self._array)

    def __getitem__(self, number: Any) -> Any:
        image = self._read(number)
        same = image.shape[:2] == (self.resolution, self.resolution)
        return image if same else centre_crop(image, self.resolution)

    def _read(self, number: int) -> np.ndarray:
        if self._array is not None:
            return np.asarray(self._array[number])
        return read_picture(self._files[number])


def _has_images(path: Path) -> bool:
    if path.suffix != ".npz":
        return True
    with np.load(path, allow_pickle=False) as arrays:
        return "arr_0" in arrays


def _stored_moments(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """`mu` and `sigma` of an .npz, if it has them."""
    if path.suffix != ".npz" or not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return (arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)) if "mu" in arrays else None


def _moments(features: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[D]` and unbiased covariance `[D, D]`, float64."""
    assert features is not None
    if len(features) < 2:
        raise UserError("a Frechet distance needs at least two images of each kind.")
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((features.shape[1],) * 2)
    for start in range(0, len(features), _ROWS):
        centred = features[start : start + _ROWS] - mean
        covariance += centred.T @ centred
    return mean, covariance / (len(features) - 1)


def frechet_distance(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """Frechet distance of two normal distributions (Heusel et al. 2017): |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    tr (A B)^(1/2) is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric and positive.
    """
    if mean_a.shape != mean_b.shape:
        raise UserError(f"features have {mean_a.size} and {mean_b.size} dimensions; use the same feature network for both.")
    values, vectors = np.linalg.eigh(covariance_a)
    root = vectors * np.sqrt(values.clip(min=0.0)) @ vectors.T
    roots = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(min=0.0))
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * roots.sum())


def precision_recall(real: np.ndarray, generated: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall of features `[N, D]`, `[M, D]` (Kynkaanniemi et al. 2019).

    The share of generated features inside the balls around real ones that reach to their k-th nearest real neighbour, and the
    other way round.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise UserError(f"precision and recall need more than {neighbours} images of each kind.")
    device = distributed.device()
    centre = real.mean(axis=0)  # distances are taken from products, which lose digits far from zero
    a, b = (torch.from_numpy(x - centre).to(device) for x in (real, generated))
    return _share_inside(b, a, _radii(a, neighbours)), _share_inside(a, b, _radii(b, neighbours))


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Distance `[N]` of each point to its k-th nearest other."""
    return torch.cat([torch.cdist(p, points).kthvalue(neighbours + 1, dim=1).values for p in points.split(_ROWS)])


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of `points` within the radius of any centre."""
    inside = sum(int((torch.cdist(p, centres) <= radii).any(dim=1).sum()) for p in points.split(_ROWS))
    return inside / len(points)


def write_samples(
    predictor: Predictor, folder: Path, count: int, *, steps: int, labels: Sequence[int] = (), guidance_channels: int = 0
) -> None:
    """`count` generated images as FOLDER/NNNNNN.png, dealt to the ranks; existing ones are kept, so it can be interrupted.

    labels: classes in turn; empty: all of the model's. An image depends on the config's seed, its number and its label alone.
    """
    labels = labels or range(predictor.model.num_classes)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(distributed.rank(), count, distributed.world_size())
    missing = [i for i in numbers if not (folder / f"{i:06d}.png").exists()]
    size = predictor.config.batch_size
    with progress(missing, "generate", "image") as bar:
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            images = predictor.generate(
                [labels[i % len(labels)] for i in part],
                [f"sample {i}" for i in part],
                steps=steps,
                guidance_channels=guidance_channels,
            )
            for i, image in zip(part, images, strict=True):
                temporary = folder / f".{i:06d}.part"
                Image.fromarray(image).save(temporary, format="png")
                temporary.replace(folder / f"{i:06d}.png")
            bar.update(len(part))
    distributed.barrier()
