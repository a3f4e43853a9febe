"""Class samples belong to their class and weights, not to the batch they are drawn in."""

import dataclasses

import torch

from dpt.config.recipe import DptConfig
from dpt.config.sections import ModelConfig, SamplingConfig
from dpt.models.dit import DiT
from dpt.training.sampling import _grid, sample_classes

CONFIG = DptConfig(
    model=ModelConfig(hidden_size=32, depth=1, num_heads=2, input_size=4, num_classes=8),
    sampling=SamplingConfig(num_inference_steps=3, labels=[5, 2]),
)


def _network() -> DiT:
    torch.manual_seed(0)
    network = DiT(CONFIG.model).eval()
    for parameter in network.parameters():  # a new network's output is zero
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def _draw(**changes: object) -> torch.Tensor:
    sampling = dataclasses.replace(CONFIG.sampling, **changes)  # type: ignore[arg-type]
    with torch.no_grad():
        return sample_classes(dataclasses.replace(CONFIG, sampling=sampling), _network(), (4, 6))


def test_samples_do_not_depend_on_their_neighbours() -> None:
    both = _draw()
    assert both.shape == (2, 4, 4, 6)
    torch.testing.assert_close(_draw(labels=[2]), both[1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(_draw(), both)
    assert _draw(labels=[]).shape[0] == 8


def test_guidance_changes_them() -> None:
    assert not torch.allclose(_draw(guidance_scale=1.0), _draw(guidance_scale=4.0), atol=1e-3)
    torch.testing.assert_close(_draw(guidance_scale=1.0), _draw(guidance_scale=1.0 + 1e-9), rtol=1e-3, atol=1e-4)


def test_grid_fills_its_last_row_with_white() -> None:
    images = [torch.full((2, 3, 3), number, dtype=torch.uint8).numpy() for number in range(6)]
    grid = _grid(images)
    assert grid.shape == (4, 12, 3)
    assert grid[0, 9, 0] == 3
    assert grid[2, 3, 0] == 5
    assert (grid[2:, 6:] == 255).all()
