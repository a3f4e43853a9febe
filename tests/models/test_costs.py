"""Parameters and MACs against built networks and torch's counter; memory against a tracker of live storages."""

import subprocess
import sys

import pytest
import torch
from torch.utils import flop_counter

from benchmarks.memory import LiveBytes
from dpt.config.presets import PRESETS, preset_values
from dpt.config.sections import ModelConfig
from dpt.data.codec import load_vae
from dpt.errors import UserError
from dpt.models import activations, build_model, costs, products
from dpt.models.costs import macs, memory, num_params, num_tokens, picture_bytes, preset_table
from dpt.training import preflight
from tests.gloo import run_ranks

aten = torch.ops.aten
TINY = {"hidden_size": 32, "depth": 2, "num_heads": 4, "input_size": 8, "num_classes": 10}
FAMILIES = {
    "dense": {},
    "eps": {"learn_sigma": False, "qk_norm": True, "patch_size": 4},
    "conditions": {"num_conditions": 2, "clip_embedding_size": 12},
    "task convolutions": {"num_conditions": 1, "patch_embed_tasks": 4},
    "swiglu": {"num_experts": 4, "expert_activation": "swiglu", "shared_expert_width": 48},
    "gelu": {"num_experts": 4, "expert_activation": "gelu", "top_k": 3, "mlp_ratio": 2.0},
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


@pytest.mark.parametrize("preset", [*PRESETS, *({"preset": p, "num_experts": 8} for p in ("a2", "XL/2"))], ids=str)
def test_parameters_of_every_preset_equal_the_built_network(preset):
    values = preset_values(preset) if isinstance(preset, str) else preset_values(preset["preset"]) | preset
    config = ModelConfig(**values)
    with torch.device("meta"):
        model = build_model(config)
    table = num_tokens(config) * config.hidden_size
    assert num_params(config).total == sum(p.numel() for p in model.parameters()) + table
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert num_params(config).routed == routed


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_every_family_equal_the_built_network(family):
    config = ModelConfig(**TINY | FAMILIES[family])
    expected = num_params(config).total - num_tokens(config) * config.hidden_size
    assert sum(p.numel() for p in build_model(config).parameters()) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_macs_equal_torchs_counter(family):
    config = ModelConfig(**TINY | FAMILIES[family])
    model, batch = build_model(config), 3
    latents, labels = torch.randn(batch, model.in_channels, 8, 12), torch.tensor([6, 7, 9])
    formulas = {  # torch counts these on GPUs only
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            flop_counter.sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        out = model(latents, labels, labels)
        forward = counter.get_total_flops()
        out.prediction.sum().backward()
    expected = macs(config, 8, 12)
    assert forward == 2 * batch * expected.forward
    assert counter.get_total_flops() == 2 * batch * (expected.training + expected.attention_recompute)


def grouped_mm_flop(a_shape, b_shape, *args, out_shape=None, **kwargs):
    """Rows of a, each times one of b's matrices [E, A, B]; or, with two matrices, one product of columns an expert."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


@pytest.mark.parametrize("family", ["swiglu", "gelu"])
def test_grouped_products_count_the_same(family, request):
    """On a GPU the experts are grouped_mm, which runs here too: same results, same count."""
    config = ModelConfig(**TINY | FAMILIES[family])
    torch.manual_seed(0)
    layer = build_model(config).blocks[0].moe
    x = torch.randn(2, 16, 32)
    layer(x)[0].square().sum().backward()
    slices = [p.grad for p in layer.experts.parameters()]
    layer.zero_grad()
    request.getfixturevalue("grouped_products")
    with flop_counter.FlopCounterMode(display=False, custom_mapping={aten._grouped_mm: grouped_mm_flop}) as counter:
        layer(x)[0].square().sum().backward()
    for parameter, expected in zip(layer.experts.parameters(), slices, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    per_token = 32 * 4 + config.top_k * (2 + (family == "swiglu")) * 32 * int(32 * config.mlp_ratio)
    per_token += 3 * 32 * config.shared_expert_width
    router_and_shared_input = 32 * 4 + 2 * 32 * config.shared_expert_width  # x needs no gradient here
    # The gradients of biases are products with a one-hot matrix [E, N] there; the cost model leaves out what is that small.
    sums = 4 * config.top_k * (int(32 * config.mlp_ratio) + 32) if family == "gelu" else 0
    assert counter.get_total_flops() == 2 * 32 * (3 * per_token - router_and_shared_input + sums)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_norm": True, "num_conditions": 1},
        {"num_experts": 8, "expert_activation": "swiglu", "shared_expert_width": 192},
        {"num_experts": 8, "expert_activation": "swiglu"},
        {"num_experts": 8, "expert_activation": "gelu"},
        {"num_experts": 16, "expert_activation": "gelu", "batch": 1},
    ],
    ids=str,
)
def test_activation_bytes_are_within_15_percent_of_the_measured_peak(fields, checkpointing, grouped_products):
    """As on a GPU; on a CPU the experts need less."""
    batch = fields.get("batch", 6)
    fields = {k: v for k, v in fields.items() if k != "batch"}
    config = ModelConfig(**{"hidden_size": 96, "depth": 4, "num_heads": 6, "num_classes": 10, **fields})
    model = build_model(config)
    model.set_activation_checkpointing(checkpointing)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    latents, labels = torch.randn(batch, model.in_channels, 32, 32), torch.arange(batch)
    existing = [*model.parameters(), *(p.grad for p in model.parameters()), latents, labels]
    with LiveBytes(existing) as live:
        out = model(latents, labels, labels)
        (out.prediction.square().mean() + out.load_balancing_loss).backward()
    estimate = memory(config, micro_batch_size=batch, precision="fp32", activation_checkpointing=checkpointing)
    assert estimate.activations == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("fields", [{}, {"num_experts": 8, "expert_activation": "swiglu", "shared_expert_width": 128}], ids=str)
def test_total_bytes_are_within_15_percent_of_a_training_steps_peak(fields, grouped_products):
    config = ModelConfig(**{"hidden_size": 64, "depth": 3, "num_heads": 4, "num_classes": 10, "input_size": 16, **fields})
    latents, labels = torch.randn(4, 4, 16, 16), torch.arange(4)
    with LiveBytes([latents, labels]) as live:
        model = build_model(config)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        averages = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):
            out = model(latents, labels, labels)
            (out.prediction.square().mean() + out.load_balancing_loss).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            torch._foreach_lerp_(averages, list(model.parameters()), 0.1)
    estimate = memory(config, micro_batch_size=4, precision="fp32", zero_stage=0)
    assert estimate.total == pytest.approx(live.peak, rel=0.15)


def deepspeed_peak(config, ep_size, stage, precision):
    """The peak of two optimizer steps, each of two micro-batches, with DeepSpeed on this rank."""
    import contextlib
    import io

    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # no compiler needed
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(torch.distributed.get_rank())
    latents, labels = torch.randn(4, 4, 16, 16), torch.arange(4)
    with LiveBytes([latents, labels]) as live, contextlib.redirect_stdout(io.StringIO()):
        model = build_model(config, ep_size=ep_size)
        zero = {"stage": stage, "reduce_bucket_size": sum(p.numel() for p in model.parameters())}
        settings = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "zero_optimization": zero}
        settings |= {"zero_allow_untested_optimizer": True}
        if precision == "bf16":
            settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        groups = [{"params": list(model.parameters()), "name": "all"}]
        if ep_size > 1:
            groups = split_params_into_different_moe_groups_for_optimizer(groups[0])
        optimizer = torch.optim.AdamW(groups, foreach=False)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        live.peak = 0  # of training, not of setting up
        for _ in range(4):
            out = engine(latents.to(model.final_layer.linear.weight.dtype), labels, labels)
            engine.backward(out.prediction.float().square().mean() + out.load_balancing_loss)
            engine.step()
    return live.peak


UNDER_DEEPSPEED = {
    "dense": ModelConfig(hidden_size=64, depth=3, num_heads=4, num_classes=10, input_size=16),
    "experts": ModelConfig(
        hidden_size=64, depth=3, num_heads=4, num_classes=10, input_size=16, num_experts=8, shared_expert_width=128
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("network", "ep_size", "stage"), [("dense", 1, 1), ("dense", 1, 2), ("dense", 1, 3), ("experts", 2, 1), ("experts", 2, 2)]
)
def test_total_bytes_are_within_15_percent_of_deepspeeds_peak(network, ep_size, stage, precision, monkeypatch):
    """Dense on one rank; experts spread over two; with units for bf16, and the activation's pieces small beside a
    layer, as those of large networks are."""
    monkeypatch.setattr(products, "_WIDENED", frozenset())
    monkeypatch.setattr(activations, "_CHUNK", 1024)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = UNDER_DEEPSPEED[network]
    estimate = memory(
        config, ranks=ep_size, ep_size=ep_size, micro_batch_size=4, precision=precision, zero_stage=stage, num_emas=0
    )
    for peak in run_ranks(ep_size, deepspeed_peak, config, ep_size, stage, precision):
        assert estimate.total == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("fields", [{}, {"num_experts": 8, "shared_expert_width": 192}, {"num_experts": 8}], ids=str)
def test_a_pictures_forward_pass_stays_within_its_estimate(fields):
    """Beside the weights; of two latents, as guidance takes."""
    config = ModelConfig(**{"hidden_size": 96, "depth": 4, "num_heads": 6, "num_classes": 10, **fields})
    model = build_model(config)
    latents, ones = torch.randn(2, 4, 32, 32), torch.ones(2, dtype=torch.int64)
    with LiveBytes([latents, ones, *model.parameters()]) as live, torch.no_grad():
        model(latents, ones, ones)
    weights = 4 * num_params(config).total
    estimate = picture_bytes(config, precision="fp32", vae_params=0, vae_channels=0) - weights
    assert 0.5 * estimate < live.peak <= estimate
    assert picture_bytes(config, precision="fp32", vae_params=0, vae_channels=0, guided=False) - weights == estimate / 2


def test_decoding_a_picture_stays_within_its_estimate():
    codec = load_vae()
    params = sum(p.numel() for p in codec.vae.parameters())
    latents = torch.randn(1, 4, 16, 16)
    with LiveBytes([latents, *codec.vae.parameters()]) as live:
        codec.decode(latents)
    config = ModelConfig(**TINY)
    shared = picture_bytes(
        config, vae_params=0, vae_channels=0, height=2, width=2
    )  # the copy of the network, next to nothing more
    estimate = picture_bytes(config, vae_params=params, vae_channels=32, height=16, width=16) - shared - 4 * params
    assert 0.5 * estimate < live.peak <= estimate
    assert preflight._VAES["embedded"] == (params, 32)


def test_pictures_count_as_far_as_activations_leave_no_room():
    config = ModelConfig(**TINY)
    without = memory(config)
    assert memory(config, pictures=without.activations).total == without.total
    assert memory(config, pictures=without.activations + 7).total == without.total + 7


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_offloading_moves_what_deepspeed_moves(stage):
    """All but device and host: the same bytes, the optimizer's copy of the weights (stages 1 and 2) and stage 1's gradients."""
    config = ModelConfig(**preset_values("S/2"))
    plain = memory(config, ranks=4, zero_stage=stage)
    moved = memory(config, ranks=4, zero_stage=stage, offload_optimizer=True)
    if stage == 0:
        assert moved == plain
        return
    assert moved.master_weights == moved.moments == moved.ema == 0
    assert (moved.weights, moved.activations, moved.buckets) == (plain.weights, plain.activations, plain.buckets)
    assert (moved.gradients > 0) == (stage == 1)
    share = num_params(config).total // 4
    copies = 2 * share if stage < 3 else 0
    assert moved.host == plain.master_weights + plain.moments + plain.ema + 4 * share + copies
    both = memory(config, ranks=4, zero_stage=stage, offload_optimizer=True, offload_param=True)
    assert both.weights == (0 if stage == 3 else plain.weights)
    assert both.total + both.host == moved.total + moved.host


def test_bytes_of_states():
    config = ModelConfig(**preset_values("S/2-8E2A"))
    n = num_params(config)
    one = memory(config, zero_stage=0, precision="fp32")
    assert (one.weights, one.gradients, one.moments, one.ema, one.master_weights) == tuple(n.total * b for b in (4, 4, 8, 4, 0))
    four = memory(config, ranks=4, ep_size=4, zero_stage=2, precision="bf16")
    held = n.total - n.routed + n.routed // 4
    share = n.total // 4
    assert (four.weights, four.gradients, four.moments, four.ema) == (2 * held, 4 * share, 8 * share, 4 * share)
    assert four.buckets == 2 * 4 * min(held, costs.REDUCE_BUCKET_SIZE)  # one is filled while the other is reduced, in fp32
    one_rank = memory(config, zero_stage=2, precision="bf16")  # as ZeRO 1: nothing to reduce
    assert one_rank.gradients == (4 + 2) * n.total
    assert memory(config, ranks=4, zero_stage=3).weights == 2 * share
    assert four.total == sum(v for k, v in vars(four).items())
    with pytest.raises(UserError, match="must divide"):
        memory(config, ranks=4, ep_size=3)
    for name in ("ranks", "ep_size", "micro_batch_size"):
        with pytest.raises(UserError, match=f"{name} is 0"):
            memory(config, **{name: 0})
    with pytest.raises(UserError, match="stage 3"):
        memory(config, ranks=4, ep_size=4, zero_stage=3)


def test_table_has_every_preset_and_the_upcycled_forms():
    rows = {row["preset"]: row for row in preset_table(ranks=8, ep_size=8)}
    assert set(PRESETS) < set(rows)
    assert round(rows["XL/2 upcycled 8E2A"]["params_total"] / 1e6) == 2757
    assert rows["a4 upcycled 8E2A"]["params_active"] == 659_748_896
    assert all(row["bytes_activations_checkpointed"] < row["bytes_activations"] for row in rows.values())


def test_costs_need_no_torch():
    code = "import sys, dpt.models, dpt.models.costs as c; c.preset_table(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
