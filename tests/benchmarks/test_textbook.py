"""What we compare with computes what we compute: the same function, the same gradients, the same merged depth."""

import pytest
import torch

from benchmarks import textbook
from dpt.config.sections import ModelConfig
from dpt.evaluation.ensembling import merge_depth
from dpt.models.dit import DiT

TINY = {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10, "input_size": 8}
FAMILIES = {
    "dense": {},
    "swiglu": {"num_experts": 4, "top_k": 2, "shared_expert_width": 16, "normalize_top_k": False},
    "gelu": {"num_experts": 4, "top_k": 2, "expert_activation": "gelu", "normalize_top_k": True},
}


def public_state(network):
    """Our network's weights under the textbook's names, one module an expert."""
    state = {}
    for name, value in network.state_dict().items():
        block, _, rest = name.partition(".moe.")
        if rest.startswith("experts."):
            for e, expert in enumerate(value):
                key = f"{block}.moe.experts.{e}."
                if rest.endswith("gate_up_weight"):
                    state[f"{key}gate_proj.weight"], state[f"{key}up_proj.weight"] = expert.chunk(2)
                elif rest.endswith("down_weight"):
                    state[f"{key}down_proj.weight"] = expert
                else:
                    state[key + rest.removeprefix("experts.").replace("_", ".")] = expert
        elif rest == "shared.gate_up.weight":
            gate, up = value.chunk(2)
            state |= {f"{block}.moe.shared_experts.gate_proj.weight": gate, f"{block}.moe.shared_experts.up_proj.weight": up}
        elif rest == "shared.down.weight":
            state[f"{block}.moe.shared_experts.down_proj.weight"] = value
        else:
            state[name] = value
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_the_textbooks_network_is_ours(family):
    config = ModelConfig(**TINY, **FAMILIES[family])
    torch.manual_seed(0)
    ours = DiT(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = textbook.DiT(config)
    plain.load_state_dict(public_state(ours))
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
