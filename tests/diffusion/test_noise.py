import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpt.config.sections import DiffusionConfig
from dpt.diffusion import noise


def _splitmix(x: int) -> int:
    """splitmix64's finaliser in exact integers."""
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@settings(max_examples=50, deadline=None)
@given(st.integers(-(2**63), 2**63 - 1))
def test_mix_is_splitmix64(x):
    assert noise._mix(torch.tensor([x])).item() % 2**64 == _splitmix(x % 2**64)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 11), st.integers(0, 2**31))
def test_any_split_of_the_batch_draws_the_same_numbers(cut, seed):
    index = torch.arange(1000, 1012)
    strength = torch.linspace(0, 0.9, 12)

    def draw(rows: slice) -> list[torch.Tensor]:
        draws = noise.RandomNumbers(seed, index[rows])
        return [
            draws.timesteps(DiffusionConfig()),
            draws.uniform("flip"),
            draws.normal("posterior", (4, 3, 5)),
            draws.noise((4, 4, 4)),
            draws.noise((2, 8, 8), strength=strength[rows]),
        ]

    for whole, first, second in zip(draw(slice(0, 12)), draw(slice(0, cut)), draw(slice(cut, 12)), strict=True):
        assert torch.equal(whole, torch.cat((first, second)))


def test_purposes_seeds_and_samples_differ():
    index = torch.arange(4)
    values = [noise.RandomNumbers(0, index).normal(p, (3,)) for p in ("noise", "posterior")] + [
        noise.RandomNumbers(1, index).normal("noise", (3,))
    ]
    flat = torch.cat(values).flatten()
    assert len(flat.unique()) == len(flat)
    seeds = noise.sample_seeds(0, "noise", index)
    assert len(torch.cat([noise.derive(seeds, k) for k in range(5)]).unique()) == 20


def test_key_seeds_depend_on_seed_key_and_member_only():
    seeds = noise.key_seeds(3, ["a", "a", "b"], [0, 1, 0])
    assert len(seeds.unique()) == 3
    assert torch.equal(noise.key_seeds(3, ["b", "a"], [0, 1]), seeds[[2, 1]])
    assert not torch.equal(noise.key_seeds(4, ["a"], [0]), seeds[:1])
    assert noise.key_seeds(0, ["a1"], [1]).item() != noise.key_seeds(0, ["a"], [11]).item()


def test_distributions():
    seeds = noise.sample_seeds(7, "noise", torch.arange(500))
    normal = noise.normal(seeds, (401,))
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(normal[:, 0].numpy(), "norm").pvalue > 0.01  # across samples too
    products = (
        (normal[:, :-1] * normal[:, 1:]).mean(),
        (normal[:-1] * normal[1:]).mean(),
        (normal[:, ::2][:, :200] ** 2 * normal[:, 1::2] ** 2).mean() - 1,
    )
    assert all(abs(p) < 0.015 for p in products)
    uniform = noise.uniform(seeds, (100,))
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 0.01
    assert uniform.max() < 1.0
    timesteps = noise.RandomNumbers(0, torch.arange(20_000)).timesteps(DiffusionConfig(num_train_timesteps=10))
    assert stats.chisquare(timesteps.bincount(minlength=10).numpy()).pvalue > 0.01
    assert torch.isfinite(normal).all()


def _reference_multires(shape: tuple[int, ...], strength: float, generator: torch.Generator) -> torch.Tensor:
    """Marigold's recipe in words: shrinking levels of noise enlarged bilinearly, the first level at full size; unnormalised."""
    _, _, height, width = shape
    total = torch.randn(shape, generator=generator)
    rows, cols = height, width
    for level in range(10):
        ratio = 2 + 2 * torch.rand(1, generator=generator).item()
        rows, cols = max(1, int(rows / ratio**level)), max(1, int(cols / ratio**level))
        coarse = torch.randn((*shape[:2], rows, cols), generator=generator)
        total += strength**level * torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
        if 1 in (rows, cols):
            break
    return total


def test_multires_noise_has_marigolds_statistics():
    seeds = noise.sample_seeds(0, "noise", torch.arange(300))
    ours = noise.multires_noise(seeds, (5, 16, 16), 0.9)
    assert ours.square().mean() == pytest.approx(1.0, abs=0.03)
    generator = torch.Generator().manual_seed(0)
    reference = torch.cat([_reference_multires((1, 5, 16, 16), 0.9, generator) for _ in range(300)])
    reference /= reference.std()

    def correlations(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([(x[..., d:] * x[..., : 16 - d]).mean() for d in (1, 2, 4, 8)])

    assert torch.allclose(correlations(ours), correlations(reference), atol=0.04)
    assert correlations(noise.normal(seeds, (5, 16, 16))).abs().max() < 0.02


@pytest.mark.parametrize("shape", [(3, 32, 24), (2, 9, 40), (4, 72, 96), (1, 2, 7), (1, 1, 5)])
def test_multires_noise_is_the_recipe_sample_by_sample(shape: tuple[int, int, int]) -> None:
    """All samples at once are what each is alone: levels of its own sizes, enlarged by PyTorch's interpolation."""
    seeds, strengths = noise.sample_seeds(5, "noise", torch.arange(6)), torch.linspace(0.1, 0.9, 6)
    ours = noise.multires_noise(seeds, shape, strengths)
    for seed, strength, batched in zip(seeds[:, None], strengths.tolist(), ours, strict=True):
        alone = noise.multires_noise(seed, shape, strength)[0]
        total = math.sqrt(2.0) * noise.normal(seed, shape)
        size = most = shape[1:]
        ratios = 2 + 2 * noise.uniform(noise.derive(seed, 0), (10,))[0].double()
        for level in range(1, 11):
            size = [max(1, int(side / ratios[level - 1].item() ** level)) for side in size]
            most = [max(1, side // 2**level) for side in most]
            coarse = noise.normal(noise.derive(seed, level), (shape[0], *most))[..., : size[0], : size[1]]
            total += strength**level * torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")
            if 1 in size:
                break
        assert torch.allclose(alone, batched, atol=1e-6)
        assert torch.allclose(total / (total.norm() / alone.norm()), alone, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 32, 32), (3, 30, 12)])
def test_multires_noise_has_unit_variance_at_any_strength(shape: tuple[int, int, int]) -> None:
    seeds = noise.sample_seeds(0, "noise", torch.arange(400))
    for strength in (0.3, 0.6, 0.95):
        assert noise.multires_noise(seeds, shape, strength).square().mean() == pytest.approx(1.0, abs=0.05)


def test_multires_noise_without_strength_is_white():
    seeds = noise.sample_seeds(0, "noise", torch.arange(3))
    white = noise.normal(seeds, (4, 8, 8))
    assert torch.allclose(noise.multires_noise(seeds, (4, 8, 8), 0.0), white, atol=1e-6)
    assert noise.multires_noise(seeds, (1, 1, 5), 0.5).shape == (3, 1, 1, 5)
    assert math.isfinite(noise.multires_noise(seeds, (2, 32, 24), 0.9).sum().item())


def test_logit_normal_timesteps_have_the_distribution_of_the_paper() -> None:
    """logit(t / T) is normal with the location and scale asked for (Esser et al. 2024, section 3.1)."""
    config = DiffusionConfig(timesteps="logit_normal", timestep_location=0.5, timestep_scale=0.8)
    timesteps = noise.RandomNumbers(3, torch.arange(20_000)).timesteps(config).double()
    assert timesteps.min() >= 0
    assert timesteps.max() < 1000
    share = (timesteps + 0.5) / 1000
    assert stats.kstest(torch.logit(share).numpy(), stats.norm(0.5, 0.8).cdf).pvalue > 0.01
    late = noise.RandomNumbers(3, torch.arange(100)).timesteps(
        DiffusionConfig(timesteps="last", prediction_type="sample", vlb_weight=0.0)
    )
    assert set(late.tolist()) == {999}


def test_initial_noise_is_fresh_or_the_same_for_every_sample_or_zero() -> None:
    seeds = noise.sample_seeds(1, "noise", torch.arange(3))
    fresh, fixed, zero = (noise.initial_noise(kind, seeds, (2, 8, 8)) for kind in ("random", "fixed", "zero"))
    assert torch.equal(fresh, noise.normal(seeds, (2, 8, 8)))
    assert torch.equal(fixed[0], fixed[2])
    assert not torch.equal(fixed[0], fresh[0])
    other = noise.initial_noise("fixed", noise.sample_seeds(9, "noise", torch.arange(5, 6)), (2, 8, 8))
    assert torch.equal(other[0], fixed[0])
    assert stats.kstest(noise.initial_noise("fixed", seeds, (4, 32, 32))[0].flatten().numpy(), "norm").pvalue > 0.01
    assert not zero.any()
    assert zero.shape == (3, 2, 8, 8)
