"""What we compare with computes what we compute: the same function, the same gradients, the same merged depth."""

import pytest
import torch

from benchmarks import textbook
from dpt.config.sections import ModelConfig
from dpt.evaluation.ensembling import merge_depth
from dpt.models.pretrained import import_weights

TINY = {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10, "input_size": 8}
FAMILIES = {
    "dense": {},
    "swiglu": {"num_experts": 4, "top_k": 2, "shared_expert_width": 16, "normalize_top_k": False},
    "gelu": {"num_experts": 4, "top_k": 2, "expert_activation": "gelu", "normalize_top_k": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_textbooks_network_is_ours(family, tmp_path):
    config = ModelConfig(**TINY, **FAMILIES[family])
    torch.manual_seed(0)
    plain = textbook.DiT(config)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(plain.state_dict() | {"pos_embed": plain.pos_embed}, tmp_path / "public.pt")
    known = {"num_heads": config.num_heads, "top_k": config.top_k, "normalize_top_k": config.normalize_top_k}
    ours = import_weights(tmp_path / "public.pt", **known)
    inputs = (torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([1, 5, 10]))
    output = ours(*inputs)
    prediction, balance = plain(*inputs)
    torch.testing.assert_close(prediction, output.prediction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(balance, output.load_balancing_loss)
    prediction.square().mean().backward()
    output.prediction.square().mean().backward()
    torch.testing.assert_close(plain.x_embedder["proj"].weight.grad, ours.x_embedder.proj.weight.grad, rtol=1e-3, atol=1e-5)


def test_a_step_updates_weights_and_averages():
    model = torch.nn.Linear(3, 1)
    before = model.weight.detach().clone()
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    textbook.training_step(model, lambda: model(torch.ones(2, 3)).square().mean())()
    assert not torch.equal(model.weight, before)
    textbook.update_ema(averages, model, decay=0.75)
    torch.testing.assert_close(averages["weight"], 0.75 * before + 0.25 * model.weight.detach())


def test_median_compilation_undoes_scales_and_shifts_as_ours_does():
    generator = torch.Generator().manual_seed(0)
    scene = torch.nn.functional.interpolate(torch.rand(1, 1, 6, 8, generator=generator), size=(48, 64), mode="bilinear")[0, 0]
    noise = 0.01 * torch.randn(5, 48, 64, generator=generator)
    maps = torch.stack([s * scene + t for s, t in zip((1, 0.5, 2, 0.8, 1.5), (0, 0.2, -0.5, 0.1, 0), strict=True)]) + noise
    plain = torch.from_numpy(textbook.median_compilation(maps.numpy()))
    ours = merge_depth(maps[None])[0][0]
    assert plain.min() == 0
    assert plain.max() == 1
    assert (plain - ours).abs().mean() < 0.01
