"""Class samples belong to their class and weights, not to the batch they are drawn in or the ranks that draw them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dpt.config.recipe import DptConfig, load_recipe
from dpt.config.sections import ModelConfig, SamplingConfig
from dpt.data.codec import load_vae
from dpt.models.dit import DiT
from dpt.training import sampling
from dpt.training.engine import Engine
from dpt.training.sampling import _grid, class_labels, sample_classes, save_class_samples
from dpt.training.step import LossModule
from tests.gloo import run_ranks

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


def _draw(labels: list[int] | None = None, **changes: object) -> torch.Tensor:
    config = dataclasses.replace(CONFIG, sampling=dataclasses.replace(CONFIG.sampling, **changes))  # type: ignore[arg-type]
    return sample_classes(config, _network(), (4, 6), class_labels(config) if labels is None else labels)


def test_samples_do_not_depend_on_their_neighbours() -> None:
    both = _draw()
    assert both.shape == (2, 4, 4, 6)
    torch.testing.assert_close(_draw([2]), both[1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(_draw(), both)


def test_the_first_eight_classes_are_drawn_unless_others_are_named() -> None:
    assert class_labels(CONFIG) == [5, 2]
    assert class_labels(dataclasses.replace(CONFIG, sampling=SamplingConfig())) == list(range(8))


def test_guidance_changes_them() -> None:
    assert not torch.allclose(_draw(guidance_scale=1.0), _draw(guidance_scale=4.0), atol=1e-3)
    torch.testing.assert_close(_draw(guidance_scale=1.0), _draw(guidance_scale=1.0 + 1e-9), rtol=1e-3, atol=1e-4)


def test_bf16_weights_are_computed_in_bf16() -> None:
    """As on GPUs: near the float32 samples, in float32."""
    network = _network()
    expected = sample_classes(CONFIG, network, (4, 6), [5])
    types = set()
    network.blocks[0].attn.register_forward_hook(lambda _, inputs, output: types.add((inputs[0].dtype, output.dtype)))
    found = sample_classes(CONFIG, network.to(torch.bfloat16), (4, 6), [5])
    assert types == {(torch.bfloat16, torch.bfloat16)}
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


def _draw_on_ranks(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run that draws before its first step: the classes that it sampled."""
    recipe = load_recipe(None, fields)
    config, codec = recipe.dpt, load_vae()
    torch.manual_seed(0)
    network = DiT(config.model, ep_size=config.training.ep_size)
    for name, parameter in network.named_parameters():  # what is zero in a new network; nothing that is spread over ranks
        if "adaLN" in name or "final_layer" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    engine = Engine(recipe, LossModule(network, config))
    sampled: list[int] = []
    sample_one = sampling.sample_classes

    def counted(config: DptConfig, network: DiT, size: tuple[int, int], labels: list[int]) -> torch.Tensor:
        sampled.extend(labels)
        return sample_one(config, network, size, labels)

    sampling.sample_classes = counted  # type: ignore[assignment]
    drawn = save_class_samples(engine, config, codec.record, (4, 4), Path(path))
    other = dataclasses.replace(codec.record, sha256="another")
    refused = save_class_samples(engine, config, other, (4, 4), Path(path).with_suffix(".none.png"))
    return {"sampled": sampled, "drawn": drawn, "refused": not refused}


def test_pictures_are_spread_over_ranks_and_the_same_on_any_number(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"train_batch_size": 4, "zero_optimization.stage": 1, "training.ema_decays": [0.9]}
    model = {"input_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 8, "num_experts": 4}
    model |= {"capacity_factor": 1.0, "router_bias_balancing": True}
    fields |= {f"model.{name}": value for name, value in model.items()}
    fields |= {"sampling.labels": [3, 0, 7], "sampling.num_inference_steps": 2}
    shares = {1: [[3, 0, 7]], 2: [[3, 7], [0]]}
    for ranks, expected in shares.items():
        path = tmp_path / f"{ranks}.png"
        found = run_ranks(ranks, _draw_on_ranks, str(path), fields | {"training.ep_size": ranks}, as_launched=True)
        assert [one["sampled"] for one in found] == expected
        assert [one["drawn"] for one in found] == [rank == 0 for rank in range(ranks)]
        assert all(one["refused"] for one in found)
    with Image.open(tmp_path / "1.png") as one, Image.open(tmp_path / "2.png") as two:
        assert one.size == (3 * 32, 32)
        assert one.tobytes() == two.tobytes()
        pictures = {one.crop((32 * n, 0, 32 * n + 32, 32)).tobytes() for n in range(3)}
    assert len(pictures) == 3
    assert not list(tmp_path.glob("*.none.png"))


def test_grid_fills_its_last_row_with_white() -> None:
    images = [torch.full((2, 3, 3), number, dtype=torch.uint8).numpy() for number in range(6)]
    grid = _grid(images)
    assert grid.shape == (4, 12, 3)
    assert grid[0, 9, 0] == 3
    assert grid[2, 3, 0] == 5
    assert (grid[2:, 6:] == 255).all()
