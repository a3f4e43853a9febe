import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from dpt.evaluation import ensembling


def _objective(maps: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, regularizer: float = 0.02) -> float:
    """Marigold's objective, straight from its definition. maps `[N, H, W]`."""
    aligned = maps * scale.float()[:, None, None] + shift.float()[:, None, None]
    pairs = sum(
        (aligned[i] - aligned[j]).square().mean().sqrt().item() for i in range(len(maps)) for j in range(i + 1, len(maps))
    )
    merged = aligned.median(0).values
    return pairs + regularizer * (merged.min().abs() + (1 - merged.max()).abs()).item()


def _bfgs(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The published solver's setting: BFGS, 2 iterations, tolerance 1e-3, numerical gradients, from each map's own range."""
    n = len(maps)
    low, high = maps.flatten(1).min(1).values, maps.flatten(1).max(1).values
    scale = 1 / (high - low).clamp(min=1e-6)
    start = torch.cat((scale, -scale * low)).double().numpy()

    def cost(parameters: np.ndarray) -> float:
        return _objective(maps, *torch.from_numpy(parameters).float().split(n))

    found = optimize.minimize(cost, start, method="BFGS", tol=1e-3, options={"maxiter": 2}).x
    scale, shift = torch.from_numpy(found).split(n)
    return scale, shift


def _members(seed: int, count: int, size: int, noise: float, *, affine: bool = True) -> torch.Tensor:
    """Noisy (affine) copies of a smooth map `[N, size, size]`."""
    generator = torch.Generator().manual_seed(seed)

    def smooth(side: int) -> torch.Tensor:
        coarse = torch.randn(1, 1, side, side, generator=generator)
        return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")[0, 0]

    base = smooth(6)
    base = (base - base.min()) / (base.max() - base.min())
    maps = torch.stack(
        [base + noise * smooth(8) + 0.3 * noise * torch.randn(size, size, generator=generator) for _ in range(count)]
    )
    if affine:
        maps = maps * (0.4 + 0.6 * torch.rand(count, 1, 1, generator=generator)) + torch.rand(count, 1, 1, generator=generator)
    return maps


def _range_of_median(maps: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> float:
    merged = (maps * scale.float()[:, None, None] + shift.float()[:, None, None]).median(0).values
    return (merged.max() - merged.min()).item()


@pytest.mark.parametrize("noise", [0.0002, 0.002, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_alignment_beats_bfgs_on_the_same_objective(count, noise):
    for seed in range(2):
        maps = _members(seed, count, 48, noise, affine=seed == 0)
        scale, shift = (x[0] for x in ensembling.align_depth(maps[None]))
        reference = _bfgs(maps)
        assert _objective(maps, scale, shift) <= _objective(maps, *reference) + 1e-9
        if noise > 0.1:  # members without a common map: the merged map's range is the noise's extremes
            continue
        # The pairs agree better in units of the merged map, too: it is not the common scale's doing.
        ours, theirs = _range_of_median(maps, scale, shift), _range_of_median(maps, *reference)
        pairs = _objective(maps, scale, shift, regularizer=0.0), _objective(maps, *reference, regularizer=0.0)
        assert pairs[0] / ours <= pairs[1] / theirs * (1 + 1e-5)


def test_affine_copies_are_merged_exactly():
    maps = _members(0, 5, 64, 0.0)[None]
    merged, uncertainty = ensembling.merge_depth(maps)
    expected = (maps[0, 0] - maps[0, 0].min()) / (maps[0, 0].max() - maps[0, 0].min())
    assert torch.allclose(merged[0], expected, atol=1e-5)
    assert uncertainty.max() < 1e-5


def test_one_outlier_does_not_spoil_the_merged_map():
    maps = _members(0, 5, 64, 0.01)
    truth = ensembling.merge_depth(maps[None, :4])[0]
    maps[4] = torch.rand(64, 64, generator=torch.Generator().manual_seed(9))
    merged, uncertainty = ensembling.merge_depth(maps[None])
    assert (merged - truth).abs().mean() < 0.02
    assert uncertainty.mean() < 0.05


def test_batches_do_not_matter():
    maps = torch.stack([_members(s, 4, 32, 0.05) for s in range(3)])
    whole = ensembling.merge_depth(maps)
    for i in range(3):
        for together, alone in zip(whole, ensembling.merge_depth(maps[i : i + 1]), strict=True):
            assert torch.allclose(together[i], alone[0], atol=1e-6)


def test_degenerate_maps_stay_finite():
    constant = torch.full((1, 3, 8, 8), 0.5)
    identical = torch.rand(1, 1, 8, 8).expand(1, 4, 8, 8)
    mixed = torch.cat((constant[:, :1], identical), dim=1)
    opposite = torch.cat((identical[:, :1], 1 - identical[:, :1]), dim=1)
    for maps in (constant, identical, mixed, opposite, identical[:, :1]):
        for aggregation in ("compile", "median", "mean"):
            merged, uncertainty = ensembling.merge_depth(maps, aggregation)
            assert torch.isfinite(merged).all()
            assert torch.isfinite(uncertainty).all()
    assert ensembling.merge_depth(identical)[0].max() == pytest.approx(1.0)
    assert torch.equal(ensembling.merge_depth(identical[:, :1], "median")[0], identical[:, 0])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**31))
def test_median_and_mad_equal_numpy(count, seed):
    values = torch.rand(2, count, 3, 4, generator=torch.Generator().manual_seed(seed))
    median, mad = ensembling.merge_values(values, "median")
    np.testing.assert_allclose(median.numpy(), np.median(values.numpy(), axis=1), rtol=1e-6)
    expected = np.median(np.abs(values.numpy() - np.median(values.numpy(), axis=1, keepdims=True)), axis=1)
    np.testing.assert_allclose(mad.numpy(), expected, atol=1e-7)
    mean, deviation = ensembling.merge_values(values, "mean")
    np.testing.assert_allclose(mean.numpy(), values.numpy().mean(1), rtol=1e-5)
    np.testing.assert_allclose(deviation.numpy(), values.numpy().std(1), atol=1e-6)


def test_flow_and_masks():
    flows = torch.zeros(1, 3, 2, 2, 2)
    flows[0, :, 0] = torch.tensor([1.0, 2.0, 9.0])[:, None, None]
    merged, uncertainty = ensembling.merge_flow(flows)
    assert merged[0, 0].unique().item() == 2.0
    assert uncertainty.unique().item() == 1.0
    assert ensembling.merge_flow(flows, "mean")[0][0, 0].unique().item() == 4.0
    masks = torch.tensor([[True, False, False], [True, True, False], [True, True, True], [True, False, False]])
    mask, dissent = ensembling.merge_masks(masks[None, :, None])
    assert mask[0, 0].tolist() == [True, False, False]  # a tie is outside
    assert dissent[0, 0].tolist() == [0.0, 0.5, 0.25]
