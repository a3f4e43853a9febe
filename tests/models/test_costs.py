"""Parameters and MACs against built networks and torch's counter."""

import subprocess
import sys

import pytest
import torch
from torch.utils import flop_counter

from dpt.config.presets import PRESETS, preset_values
from dpt.config.recipe import DptConfig
from dpt.config.sections import ModelConfig, TrainingConfig
from dpt.models import build_model
from dpt.models.costs import kept_tokens, macs, num_params, num_tokens
from dpt.models.memory import preset_table
from dpt.models.recipe_costs import recipe_macs
from tests.models.networks import SIZES, batch

aten = torch.ops.aten
FAMILIES = {
    "dense": {},
    "eps": {"learn_sigma": False, "qk_norm": True, "patch_size": 4},
    "conditions": {"num_conditions": 2, "clip_embedding_size": 12},
    "task convolutions": {"num_conditions": 1, "patch_embed_tasks": 4},
    "convolutions": {"mlp_kernel_size": 3},
    "swiglu": {"num_experts": 4, "expert_activation": "swiglu", "shared_expert_width": 48},
    "gelu": {"num_experts": 4, "expert_activation": "gelu", "top_k": 3, "mlp_ratio": 2.0},
    "fine": {
        "num_experts": 12,
        "top_k": 5,
        "mlp_ratio": 0.5,
        "shared_expert_width": 16,
        "router_gate": "sigmoid",
        "router_bias_balancing": True,
        "normalize_top_k": True,
    },
}
PAPER = {  # total and active parameters, forward GMACs at 256 and 1024 tokens
    "a1": (14_799_392, 14_799_392, 2.83, 16.1),
    "a2": (77_208_608, 77_208_608, 14.0, 68.8),
    "a3": (215_539_232, 215_539_232, 38.3, 177),
    "a4": (458_102_816, 458_102_816, 80.7, 361),
    "a5": (1_199_213_600, 1_199_213_600, 209, 902),
    "a6": (1_862_988_320, 1_862_988_320, 324, 1384),
    "XL/2": (675_129_632, 675_129_632, 118.6, 524.5),
    "S/2-8E2A": (199_307_552, 71_905_568, 16.0, 71.3),
    "S/2-16E2A": (369_213_728, 71_942_432, 16.0, 71.4),
    "L/2-8E2A": (2_823_764_000, 1_011_824_672, 222, 928),
}


@pytest.mark.parametrize("preset", PAPER)
def test_the_papers_table(preset):
    total, active, at_256, at_1024 = PAPER[preset]
    config = ModelConfig(**preset_values(preset))
    count = num_params(config)
    assert (count.total, count.active) == (total, active)
    for size, expected in ((32, at_256), (64, at_1024)):
        digits = len(str(expected).replace(".", ""))
        assert float(f"{macs(config, size, size).forward / 1e9:.{digits}g}") == expected


def test_the_upcycled_networks_of_the_paper():
    """Its figures are in millions; the XL one's count the position table of 512 px."""
    for preset, size, total, active in (
        ("a2", 32, 312, 111),
        ("a3", 32, 877, 310),
        ("a4", 32, 1868, 660),
        ("XL/2", 64, 2758, 974),
    ):
        upcycled = {"num_experts": 8, "top_k": 2, "input_size": size}
        count = num_params(ModelConfig(**preset_values(preset) | upcycled))
        assert (round(count.total / 1e6), round(count.active / 1e6)) == (total, active)


CONFIGS = {name: preset_values(name) for name in PRESETS}
CONFIGS |= {f"{name} upcycled": preset_values(name) | {"num_experts": 8} for name in ("a2", "XL/2")}
CONFIGS |= {name: SIZES | fields for name, fields in FAMILIES.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_the_built_network(name):
    config = ModelConfig(**CONFIGS[name])
    with torch.device("meta"):
        model = build_model(config)
    table = num_tokens(config) * config.hidden_size
    assert num_params(config).total == sum(p.numel() for p in model.parameters()) + table
    assert num_params(config).routed == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)


@pytest.mark.parametrize(("name", "experts"), [("S", 16), ("S", 48), ("L", 16), ("L", 48)])
def test_fine_experts_take_the_dense_networks_compute(name, experts):
    """But for the router; widths are multiples of 8, which products in bf16 take."""
    dense, fine = (ModelConfig(**preset_values(preset)) for preset in (f"{name}/2", f"{name}/2-E{experts}"))
    for side in (32, 64):
        router = fine.depth * num_tokens(fine, side, side) * fine.hidden_size * fine.num_experts
        assert macs(fine, side, side).forward - router == pytest.approx(macs(dense, side, side).forward, rel=1e-3)
        assert router < 0.02 * macs(dense, side, side).forward
    assert fine.mlp_width % 8 == fine.shared_expert_width % 8 == 0
    assert num_params(fine).total > 3 * num_params(dense).total
    assert 0.95 < num_params(fine).active / num_params(dense).active < 1.05


ATTENTION_FLOPS = {  # torch counts these on GPUs only
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        flop_counter.sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@pytest.mark.parametrize("share", [0.0, 0.75])
@pytest.mark.parametrize("family", FAMILIES)
def test_macs_equal_torchs_counter(family, share):
    """In training, a share of the tokens may bypass blocks; predictions take all tokens."""
    if share and "mlp_kernel_size" in FAMILIES[family]:
        pytest.skip("refused: convolutions need the whole grid")
    config = ModelConfig(**SIZES | FAMILIES[family] | {"depth": 4 if share else 2})
    training = TrainingConfig(bypass_share=share, bypass_first=1, bypass_last=2) if share else TrainingConfig()
    model = build_model(config)
    model.set_bypass(training.bypassed(config.depth) if share else range(0))
    kept = torch.arange(kept_tokens(num_tokens(config, 8, 12), share)).expand(4, -1) if share else None
    with flop_counter.FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        out = model(*batch(model, (8, 12)), kept=kept)
        forward = counter.get_total_flops()
        out.prediction.sum().backward()
    plain, expected = macs(config, 8, 12), recipe_macs(DptConfig(model=config, training=training), config, 8, 12)
    assert expected.forward == plain.forward
    if config.mlp_kernel_size:  # by its input's gradient, a depthwise convolution counts as a whole one
        assert forward == 2 * 4 * plain.forward
        return
    assert counter.get_total_flops() == 2 * 4 * (expected.training + expected.attention_recompute)
    if share:
        assert model.bypassed == range(1, 2)
        assert expected.training < plain.training
    else:
        assert forward == 2 * 4 * plain.forward


def grouped_mm_flop(a_shape, b_shape, *args, out_shape=None, **kwargs):
    """Rows of a, each times one of b's matrices [E, A, B]; or, with two matrices, one product of columns an expert."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


@pytest.mark.parametrize("family", ["swiglu", "gelu"])
def test_grouped_products_count_the_same(family, grouped_products):
    """On a GPU the experts are grouped_mm, which runs here too."""
    config = ModelConfig(**SIZES | FAMILIES[family])
    layer, x = build_model(config).blocks[0].moe, torch.randn(2, 16, 32)
    with flop_counter.FlopCounterMode(display=False, custom_mapping={aten._grouped_mm: grouped_mm_flop}) as counter:
        layer(x)[0].square().sum().backward()
    per_token = 32 * 4 + config.top_k * (2 + (family == "swiglu")) * 32 * int(32 * config.mlp_ratio)
    per_token += 3 * 32 * config.shared_expert_width
    router_and_shared_input = 32 * 4 + 2 * 32 * config.shared_expert_width  # x needs no gradient here
    # The gradients of biases are products with a one-hot matrix [E, N] there; the cost model leaves out what is that small.
    sums = 4 * config.top_k * (int(32 * config.mlp_ratio) + 32) if family == "gelu" else 0
    assert counter.get_total_flops() == 2 * 32 * (3 * per_token - router_and_shared_input + sums)


def test_table_has_every_preset_and_the_upcycled_forms():
    rows = {row["preset"]: row for row in preset_table(ranks=8, ep_size=8)}
    assert set(PRESETS) < set(rows)
    assert round(rows["XL/2 upcycled 8E2A"]["params_total"] / 1e6) == 2757
    assert rows["a4 upcycled 8E2A"]["params_active"] == 659_748_896
    assert all(row["bytes_activations_checkpointed"] < row["bytes_activations"] for row in rows.values())


def test_costs_need_no_torch():
    code = "import sys, dpt.models, dpt.models.memory as m; m.preset_table(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
