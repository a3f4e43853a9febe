"""muP: the scale of activations does not move with the width; weights know it wherever they go."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from training_runs import BIASES, Runs, ToyRun, ep, interrupted, marked, zero
from training_toys import MOE, random_network

from dpt.config.sections import ModelConfig, UpcyclingConfig
from dpt.errors import UserError
from dpt.models.adapting import adapt
from dpt.models.dit import DiT
from dpt.models.exporting import export_weights
from dpt.models.mup import rate_divisor, standard
from dpt.models.pretrained import read_weights
from dpt.models.upcycling import upcycle
from dpt.models.weights import Weights
from dpt.training.groups import parameter_groups

WIDTHS = (64, 128, 256, 512)
WATCHED = (
    "attn",
    "attn.qkv",
    "mlp",
    "moe",
    "adaLN_modulation",
    "blocks.0",
    "blocks.1",
    "x_embedder",
    "t_embedder",
    "y_embedder",
)
EXPERTS = {"num_experts": 4, "top_k": 2, "expert_activation": "gelu", "normalize_top_k": True}


def _scales(width: int, base_width: int, fields: dict[str, object]) -> dict[str, float]:
    """Mean absolute activations after 10 steps of Adam on one batch, by module."""
    config = ModelConfig(
        input_size=8, hidden_size=width, num_heads=4, depth=2, num_classes=10, learn_sigma=False, base_width=base_width,
        base_head_size=16, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    network = DiT(config)
    groups = parameter_groups(network, config, 0.0)
    optimizer = torch.optim.AdamW([group | {"lr": 3e-3 / group["rate_divisor"]} for group in groups])
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(8, 4, 8, 8, generator=generator) for _ in range(2))
    inputs = (x, torch.arange(0, 800, 100), torch.arange(8))
    seen: dict[str, float] = {}

    def watch(name: str):
        def hook(module, arguments, output) -> None:
            seen[name] = float((output[0] if isinstance(output, tuple) else output).detach().abs().mean())

        return hook

    for _ in range(10):
        loss = (network(*inputs).prediction - (x + noise) / 2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, module in network.named_modules():
        if name.endswith(WATCHED):
            module.register_forward_hook(watch(name))
    with torch.no_grad():
        seen["prediction"] = float(network(*inputs).prediction.abs().mean())
    return seen


def _slopes(widths: tuple[int, ...], base_width: int, fields: dict[str, object]) -> dict[str, float]:
    """Of log activation over log width."""
    scales = [_scales(width, base_width, fields) for width in widths]
    x = torch.tensor([math.log2(width) for width in widths])
    x = x - x.mean()
    logs = {name: torch.tensor([math.log2(found[name]) for found in scales]) for name in scales[0]}
    return {name: float((x * y).sum() / x.square().sum()) for name, y in logs.items()}


@pytest.mark.parametrize(
    ("fields", "bound"), [pytest.param({}, 0.15, id="dense"), pytest.param(EXPERTS, 0.25, id="experts", marks=pytest.mark.slow)]
)
def test_activations_keep_their_scale_over_widths(fields: dict[str, object], bound: float) -> None:
    with_mup, without = _slopes(WIDTHS, 64, fields), _slopes((64, 512), 0, fields)
    assert len(with_mup) == 16
    assert max(abs(slope) for slope in with_mup.values()) < bound, with_mup
    assert min(without[f"blocks.{block}.attn"] for block in range(2)) > 0.5, without
    assert max(without.values()) > 0.7


def _config(**fields: object) -> ModelConfig:
    defaults = {"input_size": 4, "hidden_size": 32, "num_heads": 2, "depth": 2, "num_classes": 8}
    return ModelConfig(**(defaults | {"base_width": 8, "base_head_size": 4} | fields))


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(3, 4, 4, 4), torch.tensor([1, 500, 900]), torch.tensor([0, 3, 8])


def test_at_the_base_nothing_differs() -> None:
    for fields in ({}, EXPERTS, {"patch_embed_tasks": 2, "qk_norm": True}):
        plain, ours = _config(base_width=0, **fields), _config(base_width=32, base_head_size=16, **fields)
        states = []
        for config in (plain, ours):
            torch.manual_seed(0)
            states.append(DiT(config).state_dict())
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
        assert {rate_divisor(name, ours) for name in states[0]} == {1.0}
        assert ours.attention_scale == plain.attention_scale
        (group,) = parameter_groups(DiT(ours), ours, 0.01)
        assert (group["rate_divisor"], group["weight_decay"]) == (1.0, 0.01)


def test_which_weights_learn_at_a_rate_of_the_width() -> None:
    config = _config(**MOE_FIELDS, clip_embedding_size=6)
    divided = {name for name, _ in DiT(config).named_parameters() if rate_divisor(name, config) == 4.0}
    kinds = {name.split(".", 2)[-1] if name.startswith("blocks") else name for name in divided}
    assert kinds == {
        "attn.qkv.weight", "attn.proj.weight", "moe.gate.weight", "moe.experts.gate_up_weight", "moe.experts.down_weight",
        "moe.shared.gate_up.weight", "moe.shared.down.weight", "adaLN_modulation.1.weight", "t_embedder.mlp.2.weight",
        "final_layer.adaLN_modulation.1.weight",
    }  # fmt: skip
    groups = parameter_groups(DiT(config), config, 0.1)
    assert {group["rate_divisor"]: group["weight_decay"] for group in groups} == {1.0: 0.1, 4.0: 0.4}


MOE_FIELDS = {"num_experts": 4, "top_k": 2, "shared_expert_width": 16}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_it_folds_into_the_standard_parametrisation(qk_norm: bool) -> None:
    network = random_network(_config(qk_norm=qk_norm))
    config, state = standard(network.config, network.state_dict())
    assert config.base_width == 0
    plain = DiT(config)
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(plain(*_inputs()).prediction, network(*_inputs()).prediction)


def test_exports_carry_it_and_diffusers_computes_the_same(tmp_path: Path) -> None:
    network = random_network(_config(timestep_features="diffusers", mlp_norm_eps=1e-5))
    path = export_weights(network, tmp_path / "ours")
    values = json.loads((path / "config.json").read_text())["model"]
    assert (values["base_width"], values["base_head_size"]) == (8, 4)
    with torch.no_grad():
        expected = network(*_inputs()).prediction
        torch.testing.assert_close(read_weights(path).build()(*_inputs()).prediction, expected)
        theirs = DiTTransformer2DModel.from_pretrained(export_weights(network, tmp_path / "theirs", format="diffusers")).eval()
        x, times, labels = _inputs()
        found = theirs(x, timestep=times, class_labels=labels).sample
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_fine_tuning_and_upcycling_keep_it() -> None:
    network = random_network(_config())
    weights = Weights(config=network.config, state=network.state_dict())
    target = dataclasses.replace(network.config, num_conditions=1, num_classes=9)
    assert adapt(weights, target).config.base_width == 8
    with pytest.raises(UserError, match=r"dpt\.model\.base_width is 0, but the weights \(our own\) have 8; set it to 8"):
        adapt(weights, dataclasses.replace(target, base_width=0))
    experts = upcycle(weights, UpcyclingConfig())
    assert experts.config.base_width == 8
    with torch.no_grad():
        torch.testing.assert_close(experts.build()(*_inputs()).prediction, network(*_inputs()).prediction, atol=1e-5, rtol=1e-4)
    plain = Weights(config=dataclasses.replace(network.config, base_width=0), state=weights.state)
    name = "blocks.0.moe.gate.weight"
    torch.testing.assert_close(2 * experts.state[name], upcycle(plain, UpcyclingConfig()).state[name])


# --- real runs --------------------------------------------------------------------------------------------------------------

MUP = {"model.base_width": 8, "model.base_head_size": 4, "training.steps": 8}
STRAIGHT = {"dense": zero(1, MUP), "experts": zero(1, MOE, MUP)}
LAYOUTS = {
    **{f"dense_zero{stage}": zero(stage, MUP) for stage in range(4)},
    "experts_ep2": ep(2, 2, MUP),
    "experts_zero3": zero(3, MOE, MUP),
}

SLOW = {"dense_zero0", "dense_zero2", "experts_zero3"}
"""Left to `make test-all`."""


@pytest.fixture(scope="module")
def runs(toy_runs: Runs) -> Runs:
    toy_runs.train(
        1,
        *(ToyRun(name=name, fields=fields) for name, fields in STRAIGHT.items()),
        ToyRun(name="changing", fields=STRAIGHT["experts"] | BIASES, sigterm_at=6),
    )
    toy_runs.train(
        2,
        *(ToyRun(name=name, fields=fields, slow=name in SLOW) for name, fields in LAYOUTS.items()),
        *interrupted("parts", LAYOUTS["dense_zero1"], 5),
        ToyRun(name="changing", fields=ep(2, 2, BIASES), ends=None),
    )
    return toy_runs


@pytest.mark.parametrize("name", [marked(SLOW, name) for name in LAYOUTS])
def test_every_layout_trains_the_same(runs: Runs, name: str) -> None:
    runs.check_close(name, name.split("_")[0], rel=2e-4)


def test_a_continued_run_is_the_same_bit_for_bit(runs: Runs) -> None:
    runs.check_equal("parts", "dense_zero1")
    assert read_weights(runs("parts") / "weights").config.base_width == 8


def test_a_checkpoint_of_another_base_is_refused(runs: Runs) -> None:
    assert "was trained with dpt.model.base_width 8; with 0" in runs.ended["changing"][1]
