"""Distances between two sets of images from their features: Frechet distance, Inception Score, precision and recall."""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpt import distributed
from dpt.errors import UserError

SPLIT = 5000
"""Images per estimate of the Inception Score, as in ADM's evaluator."""
_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class Moments:
    """First two moments of a set's features, float64. Summing parts gives the same result up to rounding."""

    count: int
    """Number of images; 0: unknown (a file that holds only the moments)."""
    mean: np.ndarray
    """Mean features `[D]`."""
    scatter: np.ndarray
    """Sum of the outer products of centred features, `[D, D]`."""

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Moments of features `[N, D]`, N at least 1."""
        mean = features.mean(axis=0, dtype=np.float64)
        scatter = np.zeros((features.shape[1],) * 2)
        for start in range(0, len(features), _ROWS):
            centred = features[start : start + _ROWS] - mean
            scatter += centred.T @ centred
        return cls(count=len(features), mean=mean, scatter=scatter)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both sets together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count=count, mean=self.mean + apart * (other.count / count), scatter=scatter)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance `[D, D]`. UserError for a single image."""
        if self.count < 2:
            raise UserError("a Frechet distance needs at least two images of each kind.")
        return self.scatter / (self.count - 1)


def combine_moments(parts: Sequence[Moments | None]) -> Moments | None:
    """Moments of all parts together; None if there are none."""
    known = [part for part in parts if part is not None]
    return functools.reduce(operator.add, known) if known else None


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


class ScoreSums:
    """Sums of class probabilities that the Inception Score needs."""

    def __init__(self) -> None:
        self.sums: dict[int, np.ndarray] = {}
        """Image count, sum of p log p and sum of p, float64 `[2 + K]`, keyed by split of `SPLIT` images."""

    def add(self, numbers: Sequence[int], probabilities: np.ndarray) -> None:
        """Add images by number, with their probabilities `[B, K]`."""
        values = torch.from_numpy(probabilities).double()
        negative_entropy = torch.special.xlogy(values, values).sum(1, keepdim=True)
        rows = torch.cat((torch.ones_like(negative_entropy), negative_entropy, values), dim=1).numpy()
        for number, row in zip(numbers, rows, strict=True):
            self.sums[number // SPLIT] = self.sums.get(number // SPLIT, 0.0) + row

    def merge(self, other: "ScoreSums") -> None:
        """Add another's images."""
        for split, row in other.sums.items():
            self.sums[split] = self.sums.get(split, 0.0) + row

    def score(self) -> float:
        """Mean over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016, as ADM's evaluator splits)."""
        scores = []
        for _, (count, entropy, *total) in sorted(self.sums.items()):
            mean = torch.tensor(total, dtype=torch.float64) / count
            scores.append(float(np.exp(entropy / count - torch.special.xlogy(mean, mean).sum().item())))
        return float(np.mean(scores))


def precision_recall(real: np.ndarray, generated: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall of features `[N, D]`, `[M, D]` (Kynkaanniemi et al. 2019), on every rank; the ranks share the work.

    Precision is the share of generated features inside the balls around real ones that reach to their k-th nearest real
    neighbour; recall swaps the roles. Collective: every rank passes the same features.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise UserError(
            f"precision and recall need more than {neighbours} images of each kind; {len(generated)} generated and {len(real)} "
            "real ones are given."
        )
    device = distributed.device()
    centre = real.mean(axis=0)  # distances are computed from products, which lose digits far from zero
    a, b = (torch.from_numpy(x - centre).to(device) for x in (real, generated))
    return _share_inside(b, a, _radii(a, neighbours)), _share_inside(a, b, _radii(b, neighbours))


def _parts(points: Tensor) -> tuple[tuple[Tensor, ...], range]:
    """Split `points` into blocks of rows; also return the indices of this rank's blocks."""
    blocks = points.split(_ROWS)
    return blocks, range(distributed.rank(), len(blocks), distributed.world_size())


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Distance `[N]` of each point to its k-th nearest neighbour."""
    blocks, mine = _parts(points)
    found = {i: torch.cdist(blocks[i], points).kthvalue(neighbours + 1, dim=1).values.cpu().numpy() for i in mine}
    all_found = {i: radii for part in distributed.gather_objects(found) for i, radii in part.items()}
    return torch.from_numpy(np.concatenate([all_found[i] for i in range(len(blocks))])).to(points.device)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of `points` within the radius of any centre."""
    blocks, mine = _parts(points)
    inside = sum(int((torch.cdist(blocks[i], centres) <= radii).any(dim=1).sum()) for i in mine)
    return distributed.all_reduce_sum({"inside": float(inside)})["inside"] / len(points)
