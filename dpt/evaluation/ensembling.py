"""Merge several predictions of one input into one with an uncertainty: pixelwise, or after affine alignment of depth maps.

Everything is batched and stays on the tensors' device: B inputs, N members.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dpt import tasks
from dpt.errors import UserError

REGULARIZER = 0.02
"""Weight of the term that keeps the merged map in [0, 1] (Marigold)."""
COMMON_SCALE_FLOOR = 1e-3
"""Smallest range that `align_depth` gives the merged map; 0 would be degenerate."""
_CHUNK = 1 << 16
_MOST_ITERATIONS = 40
_CONVERGED = 1e-12


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Result for one image, at its own size."""

    value: np.ndarray
    """depth: float32 `[H, W]`, up to scale and shift; flow: float32 `[2, H, W]` pixels; amodal: bool `[H, W]`; registered
    tasks: float32 `[C, H, W]`."""
    uncertainty: np.ndarray
    """float32 `[H, W]`, 0 without an ensemble: depth and flow in the value's units; amodal: share of dissenting votes."""
    whole: np.ndarray | None = None
    """amodal, from `Predictor.__call__`: uint8 `[H, W, 3]`, the completed object in colour, white outside `value`."""


def whole_object(pictures: Tensor, mask: np.ndarray) -> np.ndarray:
    """Members' pictures `[N, 3, h, w]` in [-1, 1] -> their median, uint8 `[H, W, 3]` at `mask`'s size, white outside it."""
    middle = pictures.median(dim=0).values.cpu().numpy()
    picture = tasks.resize_image(tasks.image_to_uint8(middle), (mask.shape[0], mask.shape[1]))
    return tasks.visible_object(picture, mask)


def merge_members(task: str, values: Tensor, size: tuple[int, int], aggregation: str) -> Prediction:
    """Members' values `[N, ...]` of one sample, from `Predictor.decode` -> their prediction at `size` (H, W) in pixels.

    Members are merged at the network's resolution, then resized (for masks, the share of votes is resized and thresholded).
    """
    if task == "depth":
        merged, uncertainty = merge_depth(values[None], aggregation)
    elif task == "amodal":
        mask, uncertainty = merge_masks(values[None])
        merged = torch.where(mask, 1.0 - uncertainty, uncertainty)
    else:  # a vector at each pixel
        if task == "flow":  # fractions of the width and height
            values = values * values.new_tensor([size[1], size[0]])[:, None, None]
        merged, uncertainty = merge_flow(values[None], aggregation)
    value = tasks.resize_smooth(merged[0].cpu().numpy(), size)
    if task == "amodal":
        value = value > 0.5
    elif (finish := tasks.task_spec(task).finish) is not None:
        value = finish(value)
    return Prediction(value=value, uncertainty=tasks.resize_smooth(uncertainty[0].cpu().numpy(), size))


def merge_depth(maps: Tensor, aggregation: str = "compile") -> tuple[Tensor, Tensor]:
    """Depth `[B, N, H, W]`, each up to scale and shift -> merged depth and its uncertainty, float32 `[B, H, W]` each.

    "compile": members are aligned (`align_depth`), the pixelwise median is taken and brought to [0, 1] (median compilation,
    Ke et al. 2024, section 3.3). "median", "mean": pixelwise, unaligned. Uncertainty: median absolute deviation from the
    median (standard deviation for "mean"), in the merged map's units. UserError if a member is not finite everywhere.
    """
    maps = maps.float()
    if not bool(maps.isfinite().all()):
        row, member = (int(i) for i in (~maps.isfinite()).flatten(2).any(2).nonzero()[0])
        raise UserError(f"input {row}: depth map {member} of {maps.shape[1]} has values that are not finite; predict it again.")
    if aggregation == "compile" and maps.shape[1] > 1:
        _, scale, shift = _align_to_unit_range(maps)
        maps = maps * scale.float()[..., None, None] + shift.float()[..., None, None]
    merged, uncertainty = merge_values(maps, aggregation)
    if aggregation == "compile":
        low, high = merged.amin((1, 2), keepdim=True), merged.amax((1, 2), keepdim=True)
        extent = (high - low).clamp(min=1e-6)
        merged, uncertainty = (merged - low) / extent, uncertainty / extent
    return merged, uncertainty


def merge_flow(flows: Tensor, aggregation: str = "median") -> tuple[Tensor, Tensor]:
    """Flows `[B, N, 2, H, W]` in pixels (or any vectors) -> flow `[B, 2, H, W]` and its uncertainty `[B, H, W]`, in pixels: as
    `merge_values`, taking the length of its second vector."""
    merged, uncertainty = merge_values(flows.float(), aggregation)
    return merged, torch.linalg.vector_norm(uncertainty, dim=1)


def merge_masks(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Masks bool `[B, N, H, W]` -> majority bool `[B, H, W]` (ties count as outside) and the share of dissenting votes."""
    share = masks.float().mean(1)
    return share > 0.5, torch.minimum(share, 1.0 - share)


def merge_values(values: Tensor, aggregation: str) -> tuple[Tensor, Tensor]:
    """`[B, N, ...]` -> pixelwise mean and standard deviation for "mean", else median and median absolute deviation."""
    if aggregation == "mean":
        return values.mean(1), values.std(1, unbiased=False)
    median = _median(values)
    return median, _median((values - median[:, None]).abs())


def _median(values: Tensor) -> Tensor:
    """Median over dim 1; for an even count, the mean of the two middle values."""
    ordered = _sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _sorted(values: Tensor) -> list[Tensor]:
    """Slices along dim 1, sorted elementwise: whole-map comparisons are far faster than sorting short strided rows."""
    slices = list(values.unbind(1))
    for i, j in _sorting_network(len(slices)):
        slices[i], slices[j] = torch.minimum(slices[i], slices[j]), torch.maximum(slices[i], slices[j])
    return slices


@lru_cache(maxsize=64)
def _sorting_network(count: int) -> list[tuple[int, int]]:
    """Comparators that sort `count` items (Batcher's merge exchange: Knuth, TAOCP 3, 5.2.2, algorithm M)."""
    comparators: list[tuple[int, int]] = []
    top = 1 << max(0, math.ceil(math.log2(max(1, count))) - 1)
    p = top
    while p > 0 and count > 1:
        q, r, d = top, 0, p
        while True:
            comparators += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return comparators


@torch.no_grad()
def align_depth(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and shifts, float64 `[B, N]`, that align the members of depth maps `[B, N, H, W]`.

    They minimise Marigold's objective: the sum over pairs of the RMS difference of scale_i map_i + shift_i, plus 0.02 times
    |min| + |1 - max| of the merged (median) map. Solution:
    - For given scales every RMS difference is least when all aligned means are equal, which fixes all shifts but one.
    - Then the squared differences need only the covariances of the maps, computed once. The sum of their roots is minimised
      over the scales, under a linear condition that fixes the merged map's range, by iteratively reweighted least squares
      (Weiszfeld 1937): one N x N solve per iteration. The range is linearised at the merged map's extreme pixels; the best
      result is kept.
    - The rest is linear in the merged map's range L: L pairs + 0.02 (1 - L). It is least at L = 1 if the pairs
      disagree by less than 0.02 in sum, else as L goes to 0, where we stop at 1e-3. Merging undoes this common scale anyway.
    """
    cost, scale, shift = _align_to_unit_range(maps)
    extent = torch.where(cost <= REGULARIZER, 1.0, COMMON_SCALE_FLOOR).double()[:, None]
    return scale * extent, shift * extent


def _align_to_unit_range(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of RMS differences `[B]`, scales `[B, N]`, shifts `[B, N]`), float64, when the merged map goes from 0 to 1."""
    flat = maps.flatten(2)  # [B, N, HW]
    members = flat.shape[1]
    means, covariance = _moments(flat)
    extents = (flat.amax(2) - flat.amin(2)).double()
    condition, scale = extents / members, 1.0 / extents.clamp(min=1e-6)
    best_cost, best_scale, best_shift = torch.full_like(means[:, 0], math.inf), torch.zeros_like(means), torch.zeros_like(means)
    for iteration in range(4):
        if iteration > 0:  # the first candidate is Marigold's start, each map's own range
            scale = _balanced_scales(covariance, condition)
        shift = -scale * means
        merged = _sorted(flat * scale.float()[..., None] + shift.float()[..., None])[(members - 1) // 2]
        (low, lowest), (high, highest) = merged.min(1), merged.max(1)
        extent = (high - low).double().clamp(min=1e-12)
        cost = _distances(covariance, scale).triu(1).sum((1, 2)) / extent
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best_scale = torch.where(better[:, None], scale / extent[:, None], best_scale)
        best_shift = torch.where(better[:, None], (shift - low.double()[:, None]) / extent[:, None], best_shift)
        if iteration > 0:
            top, bottom = (flat.gather(2, p[:, None, None].expand(-1, members, 1))[..., 0].double() for p in (highest, lowest))
            condition = (top - bottom) / members
    return best_cost, best_scale, best_shift


def _moments(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Means `[B, N]` and covariances `[B, N, N]` over pixels of `[B, N, P]`, float64, a chunk of pixels at a time."""
    pixels = flat.shape[2]
    means = sum(c.double().sum(2) for c in flat.split(_CHUNK, dim=2)) / pixels
    assert isinstance(means, Tensor)
    covariance = torch.zeros(*means.shape, means.shape[1], dtype=torch.float64, device=flat.device)
    for chunk in flat.split(_CHUNK, dim=2):
        centred = chunk.double() - means[..., None]
        covariance += centred @ centred.mT
    return means, covariance / pixels


def _distances(covariance: Tensor, scale: Tensor) -> Tensor:
    """RMS differences `[B, N, N]` of the scaled, centred maps."""
    scaled = covariance * scale[:, :, None] * scale[:, None, :]
    power = scaled.diagonal(dim1=1, dim2=2)
    return (power[:, :, None] + power[:, None, :] - 2.0 * scaled).clamp(min=0.0).sqrt()


def _balanced_scales(covariance: Tensor, condition: Tensor) -> Tensor:
    """Scales `[B, N]` with condition . scale = 1 that minimise the sum of RMS differences (see `align_depth`).

    Computed on the CPU, as N x N systems are too small for a GPU, until no scale of a sample changes by more than `_CONVERGED`
    of its largest.
    """
    device, covariance, condition = covariance.device, covariance.cpu(), condition.cpu()
    power = covariance.diagonal(dim1=1, dim2=2)  # [B, N]
    typical = power.mean(1, keepdim=True).clamp(min=1e-30)
    ridge = 1e-12 * torch.eye(power.shape[1], dtype=power.dtype) + torch.diag_embed(
        (power < 1e-12 * typical).double()  # a constant map has no scale
    )
    scale = _met(condition, torch.rsqrt(power.clamp(min=1e-12 * typical)))
    moving = torch.ones(len(scale), 1, dtype=torch.bool)
    for _ in range(_MOST_ITERATIONS):
        weights = 1.0 / _distances(covariance, scale).clamp(min=1e-9 * typical.sqrt()[..., None])
        weights = weights - torch.diag_embed(weights.diagonal(dim1=1, dim2=2))
        weights = weights / weights.sum((1, 2), keepdim=True).clamp(min=1e-30)
        system = torch.diag_embed(weights.sum(2) * power) - weights * covariance
        solved = _met(condition, torch.linalg.solve(system / typical[..., None] + ridge, condition))
        change, scale = (solved - scale).abs().amax(1, keepdim=True), torch.where(moving, solved, scale)
        moving = moving & (change > _CONVERGED * scale.abs().amax(1, keepdim=True))
        if not bool(moving.any()):
            break
    return scale.to(device)


def _met(condition: Tensor, scale: Tensor) -> Tensor:
    """`scale` times what makes condition . scale = 1; 0 where that is impossible (all maps constant)."""
    product = (condition * scale).sum(1, keepdim=True)
    possible = product.abs() > 1e-30
    return torch.where(possible, scale / torch.where(possible, product, 1.0), 0.0)
