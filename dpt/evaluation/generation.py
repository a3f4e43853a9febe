"""Metrics of class-conditional images: FID, sFID, Inception Score, precision, recall and FD-DINOv2 against real images."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpt import distributed
from dpt.errors import UserError
from dpt.evaluation.feature_networks import FeatureNetwork
from dpt.evaluation.files import write_json, write_png
from dpt.evaluation.image_metrics import Moments, ScoreSums, combine_moments, frechet_distance, precision_recall
from dpt.evaluation.image_sources import ImageSource, Statistics
from dpt.evaluation.loading import float32_products
from dpt.evaluation.prediction import Predictor
from dpt.progress import Progress, progress
from dpt.threads import InOrder, threads_beside

_ROWS = 2048


@dataclass
class _Sums:
    """Features of one kind on one rank, reduced to moments a block at a time."""

    total: Moments | None = None
    waiting: list[np.ndarray] = field(default_factory=list)

    def add(self, features: np.ndarray) -> None:
        self.waiting.append(features)
        if sum(map(len, self.waiting)) >= _ROWS:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.total = combine_moments([self.total, Moments.of(np.concatenate(self.waiting))])
            self.waiting.clear()


def collect_features(
    source: ImageSource, network: FeatureNetwork, *, batch_size: int = 64, manifold_images: int = 0, title: str = "images"
) -> Statistics:
    """Collect the features of all images of a source, on every rank. Collective.

    Batches hold `batch_size` images in order, whatever the number of ranks, and are dealt out whole: the figures differ only
    by the rounding of sums. manifold_images: number of images kept for precision and recall, evenly spaced; 0: all.
    """
    count = len(source)
    kept = spread(count, min(manifold_images or count, count))
    pooled, spatial, scores = _Sums(), _Sums(), ScoreSums()
    found: list[tuple[np.ndarray, np.ndarray]] = []
    starts = range(distributed.rank() * batch_size, count, distributed.world_size() * batch_size)
    bar: Progress[int] = progress(starts, f"features of {title}", "batch")
    with distributed.shared_errors(), float32_products("fp32", distributed.device()):
        for start in bar:
            numbers = np.arange(start, min(start + batch_size, count))
            batch = torch.from_numpy(source.batch(numbers.tolist()))
            features = network(batch.permute(0, 3, 1, 2).contiguous())
            if not bool(features.pooled.isfinite().all()):
                raise UserError(f"{network.name}: the features of {title} {start} and on are not finite; give another network.")
            pooled.add(features.pooled.numpy())
            if features.spatial is not None:
                spatial.add(features.spatial.numpy())
            if features.probabilities is not None:
                scores.add(numbers.tolist(), features.probabilities.numpy())
            chosen = np.isin(numbers, kept)
            found.append((numbers[chosen], features.pooled.numpy()[chosen]))
    pooled.flush()
    spatial.flush()
    parts = distributed.gather_objects((pooled.total, spatial.total, scores, found))
    moments, total_spatial = combine_moments([part[0] for part in parts]), combine_moments([part[1] for part in parts])
    assert moments is not None
    total_scores = ScoreSums()
    chosen_features = np.empty((len(kept), moments.mean.size), dtype=np.float32)
    for part in parts:
        total_scores.merge(part[2])
        for numbers, rows in part[3]:
            chosen_features[np.searchsorted(kept, numbers)] = rows
    return Statistics(
        pooled=(moments.mean, moments.covariance),
        spatial=None if total_spatial is None else (total_spatial.mean, total_spatial.covariance),
        features=chosen_features,
        network=network.sha256,
        count=count,
        resolution=source.resolution,
        inception_score=total_scores.score() if total_scores.sums else None,
    )


def spread(count: int, chosen: int) -> np.ndarray:
    """Indices int64 `[chosen]` into `count` images, evenly spaced because sets are often ordered by class."""
    return np.linspace(0, count - 1, chosen).round().astype(np.int64)


def compare_features(generated: Statistics, reference: Statistics, *, neighbours: int = 3) -> dict[str, float]:
    """Return {"fid", "sfid", "inception_score", "precision", "recall"}, each if the features and the reference allow it.

    Returned on every rank; collective.
    """
    result = {"fid": frechet_distance(*generated.pooled, *reference.pooled)}
    if generated.spatial is not None and reference.spatial is not None:
        result["sfid"] = frechet_distance(*generated.spatial, *reference.spatial)
    if generated.inception_score is not None:
        result["inception_score"] = generated.inception_score
    if generated.features is not None and reference.features is not None:
        result["precision"], result["recall"] = precision_recall(reference.features, generated.features, neighbours)
    return result


def spread_labels(count: int, shares: Sequence[float]) -> list[int]:
    """Assign classes to `count` images by their shares; the first images are the same for any count.

    Every class gets its share of any run of images, to within a few: image i takes the class at the fractional part of
    i times the golden ratio, a sequence that fills [0, 1) evenly. Equal shares are dealt in turn.
    """
    classes = len(shares)
    if len(set(shares)) == 1:
        return [i % classes for i in range(count)]
    ends = np.cumsum(np.asarray(shares, dtype=np.float64))
    places = np.modf((np.arange(count) + 0.5) * ((1 + 5**0.5) / 2))[0]
    return np.searchsorted(ends / ends[-1], places, side="right").clip(max=classes - 1).tolist()


def image_name(number: int) -> str:
    """File name of a generated image."""
    return f"{number:06d}.png"


def write_samples(
    predictor: Predictor,
    folder: Path,
    labels: Sequence[int],
    *,
    steps: int,
    guidance_channels: int = 0,
) -> None:
    """Generate one image per label as FOLDER/NNNNNN.png; existing ones are kept, so a stopped run resumes. Collective.

    Batches of the config's size are the same for any number of ranks and are dealt out whole: an image depends on the config's
    seed, its number and its label, not on which rank computes it. Call `claim_folder` first, so that existing images have the
    same settings.
    """
    size = predictor.config.batch_size
    batches = [range(start, min(start + size, len(labels))) for start in range(0, len(labels), size)]
    # Listed once: a rank listing later would see files written meanwhile by others, and deal the batches differently.
    there = distributed.broadcast_object({path.name for path in folder.glob("*.png")} if distributed.is_main() else set())
    missing = [batch for batch in batches if any(image_name(i) not in there for i in batch)]
    done = sum(image_name(i) in there for i in range(len(labels)))
    if done:
        distributed.log(f"{folder} has {done} of {len(labels)} images.")
    mine = missing[distributed.rank() :: distributed.world_size()]
    bar: Progress[int] = progress(sum(map(len, mine)), "generate", "image")
    writers = InOrder[None](threads_beside(predictor.device.type), "sample writer", behind=len(mine[0]) if mine else 0)
    with distributed.shared_errors(), bar, closing(writers):
        for batch in mine:
            images = predictor.generate(
                [labels[i] for i in batch],
                [f"sample {i}" for i in batch],
                steps=steps,
                guidance_channels=guidance_channels,
            )
            for i, image in zip(batch, images, strict=True):
                if image_name(i) not in there:
                    list(writers.submit(write_png, folder / image_name(i), image))
            bar.update(len(batch))
        list(writers.finish())


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Record everything that the images depend on beside them, in FOLDER/settings.json. UserError if existing images were made
    with other settings. Collective."""
    file, settings = folder / "settings.json", json.loads(json.dumps(settings, default=str))
    with distributed.shared_errors():
        if not distributed.is_main():
            return
        if file.is_file():
            old = json.loads(file.read_text(encoding="utf-8"))
            for name in sorted(old.keys() | settings.keys()):
                if old.get(name) != settings.get(name):
                    raise UserError(
                        f"{folder} has images made with {name} {old.get(name)}, not {settings.get(name)}; give another --out, "
                        "or remove them."
                    )
        elif any(folder.glob("*.png")):
            raise UserError(f"{folder} has pictures that nothing is known of; give another --out.")
        else:
            write_json(file, settings)
