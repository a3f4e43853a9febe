"""Random numbers that belong to a sample, not to a batch, a rank or a device.

Each sample has a 64-bit seed; number j of its stream is a hash of (seed, j). So any split of a batch over steps, ranks or
devices draws the same numbers, nothing is kept between calls, and everything is computed in parallel where the data is.
The hash is splitmix64's finaliser (Steele, Lea & Flood 2014), applied to the counter and again to seed xor hashed counter.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dpt.config.sections import DiffusionConfig

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with the same bits as the lower 64 of `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser, a bijection of int64 (products wrap)."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _digest(*parts: object) -> int:
    """Signed 64-bit hash of the parts' text; parts cannot run into each other."""
    text = "".join(f"{len(str(p))}:{p}" for p in parts)
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def sample_seeds(seed: int, purpose: str, sample_index: Tensor) -> Tensor:
    """Seeds int64 `[B]` for the samples int64 `[B]` of a run; each purpose ("noise", "timestep", ...) has its own."""
    return _mix(_mix(sample_index * _signed(_GOLDEN)) ^ _digest(seed, purpose))


def key_seeds(seed: int, keys: Sequence[str], members: Sequence[int], *, purpose: str = "noise") -> Tensor:
    """Seeds int64 `[B]` for evaluation: of sample `keys[i]`'s ensemble member `members[i]`."""
    return torch.tensor([_digest(seed, purpose, k, m) for k, m in zip(keys, members, strict=True)], dtype=torch.int64)


def derive(seeds: Tensor, number: int) -> Tensor:
    """Further independent seeds `[B]` for the same samples, one set per `number` (a sampler's step, a noise level)."""
    return _mix(seeds ^ _digest("derive", number))


def _bits(seeds: Tensor, count: int) -> Tensor:
    """int64 `[B, count]` of hashed bits."""
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=seeds.device) * _signed(_GOLDEN)
    return _mix(seeds[:, None] ^ _mix(counter)[None])


def uniform(seeds: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """float32 `[B, *shape]`, uniform in [0, 1), on the seeds' device."""
    count = math.prod(shape)
    return (_shift_right(_bits(seeds, count), 40).float() * 2.0**-24).reshape(len(seeds), *shape)


def normal(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """float32 `[B, *shape]`, standard normal (Box & Muller 1958; two numbers from each 64 bits), on the seeds' device."""
    count = math.prod(shape)
    bits = _bits(seeds, (count + 1) // 2)
    radius = torch.sqrt(-2.0 * torch.log((_shift_right(bits, 32).float() + 0.5) * 2.0**-32))
    angle = (bits & 0xFFFFFFFF).float() * (2.0 * math.pi * 2.0**-32)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1).flatten(1)
    return pairs[:, :count].reshape(len(seeds), *shape)


@lru_cache(maxsize=64)
def _upsampling(largest: int, fine: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation to `fine` pixels along one side, for every coarse size 1..`largest`.

    Returns matrices float32 `[largest, fine, largest]`, [c - 1] taking the first c of `largest` numbers, and the mean variance
    that each makes of white noise of unit variance, float64 `[largest]`.
    """
    matrices = torch.zeros(largest, fine, largest)
    for coarse in range(1, largest + 1):
        weights = torch.nn.functional.interpolate(torch.eye(coarse)[None], size=fine, mode="linear", align_corners=False)
        matrices[coarse - 1, :, :coarse] = weights[0].T
    spread = matrices.double().square().sum(2).mean(1)
    return matrices.to(device), spread.to(device)


def _largest_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Largest size of each level of multi-resolution noise: sides of level i are at most 1 / 2^i of those before."""
    sizes = [(height, width)]
    while len(sizes) == 1 or 1 not in sizes[-1]:
        shrink = 2 ** len(sizes)
        sizes.append((max(1, sizes[-1][0] // shrink), max(1, sizes[-1][1] // shrink)))
    return sizes[1:]


def multires_noise(seeds: Tensor, shape: Sequence[int], strength: Tensor | float) -> Tensor:
    """Multi-resolution noise float32 `[B, C, h, w]` of unit expected variance, distributed as Marigold's (Ke et al. 2024).

    White noise counts twice; level i = 1, 2, ... adds white noise whose sides are 1 / r^i of the level before, bilinearly
    enlarged, times strength^i, down to one pixel; r is uniform in [2, 4] per level and sample. `strength`: `[B]` or a number in
    [0, 1); Marigold's is 0.9, times t / T when annealed. Divided by the expected deviation, not by the batch's, so that
    samples do not depend on each other. Sizes differ between samples: each takes a corner of noise of a level's largest size,
    so that all are made at once and nothing waits for a GPU.
    """
    strengths = torch.as_tensor(strength, device=seeds.device).double().expand(len(seeds))
    noise, variance = math.sqrt(2.0) * normal(seeds, shape), torch.full_like(strengths, 2.0)
    channels, *fine = shape
    sizes, levels = [torch.full_like(seeds, side) for side in fine], _largest_sizes(*fine)
    ratios = 2.0 + 2.0 * uniform(derive(seeds, 0), (len(levels),)).double()
    going_on = torch.ones_like(seeds, dtype=torch.bool)
    for level, largest in enumerate(levels, start=1):
        weight = torch.where(going_on, strengths**level, 0.0)
        sizes = [(size / ratios[:, level - 1] ** level).long().clamp(min=1) for size in sizes]
        tables = [_upsampling(most, side, seeds.device) for most, side in zip(largest, fine, strict=True)]
        rows, cols = (matrices[size - 1] for (matrices, _), size in zip(tables, sizes, strict=True))
        spreads = [spread[size - 1] for (_, spread), size in zip(tables, sizes, strict=True)]
        coarse = normal(derive(seeds, level), (channels, *largest))
        weighted = weight.float()[:, None, None] * rows
        noise += weighted[:, None] @ (coarse @ cols[:, None].mT)
        variance += weight**2 * spreads[0] * spreads[1]
        going_on = going_on & (sizes[0] > 1) & (sizes[1] > 1)
    return noise.div_(variance.sqrt().float()[:, None, None, None])


def initial_noise(kind: str, seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """The initial latents for sampling, float32 `[B, C, h, w]`, by `DiffusionConfig.initial_noise`; `seeds` int64 `[B]`.

    "random": standard normal; "fixed": the same standard normal numbers for every sample, run and machine; "zero": zeros.
    """
    if kind == "random":
        return normal(seeds, shape)
    if kind == "fixed":
        return normal(torch.full_like(seeds[:1], _digest("fixed noise")), shape).expand(len(seeds), *shape)
    return torch.zeros(len(seeds), *shape, device=seeds.device)


class RandomNumbers:
    """All random numbers of one training batch: functions of (seed, sample_index) alone.

    `sample_index`: int64 `[B]`, positions in the global stream; the numbers are on its device.
    """

    def __init__(self, seed: int, sample_index: Tensor) -> None:
        self._seed, self._index = seed, sample_index

    def seeds(self, purpose: str) -> Tensor:
        """Seeds int64 `[B]` for a purpose."""
        return sample_seeds(self._seed, purpose, self._index)

    def timesteps(self, config: DiffusionConfig) -> Tensor:
        """Timesteps int64 `[B]` in 0..T - 1, distributed as `config.timesteps` says.

        "logit_normal": logit(t / T) is normal (Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1).
        """
        total = config.num_train_timesteps
        if config.timesteps == "last":
            return torch.full_like(self._index, total - 1)
        if config.timesteps == "uniform":
            return (uniform(self.seeds("timestep")).double() * total).long()
        logit = config.timestep_location + config.timestep_scale * normal(self.seeds("timestep"), ()).double()
        return (torch.sigmoid(logit) * total).long().clamp(max=total - 1)

    def uniform(self, purpose: str) -> Tensor:
        """float32 `[B]` in [0, 1) for a purpose: "label_drop", "flip", ..."""
        return uniform(self.seeds(purpose))

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """float32 `[B, *shape]`, standard normal, for a purpose: "posterior", ..."""
        return normal(self.seeds(purpose), shape)

    def noise(self, shape: Sequence[int], *, strength: Tensor | float = 0.0) -> Tensor:
        """The forward process's noise, float32 `[B, C, h, w]`: white, or multi-resolution with `strength` (`[B]` or number)."""
        if isinstance(strength, Tensor) or strength > 0:
            return multires_noise(self.seeds("noise"), shape, strength)
        return self.normal("noise", shape)
