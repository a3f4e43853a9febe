"""The memory estimates against a tracker of live storages."""

import contextlib
import io

import pytest
import torch

from benchmarks.memory import LiveBytes
from dpt.config.sections import ModelConfig
from dpt.cpu import gelu, upcast
from dpt.data.codec import load_vae
from dpt.models import build_model
from dpt.models.costs import num_params
from dpt.models.memory import memory, picture_bytes
from dpt.models.vae_costs import VAESize, vae_config, vae_size
from tests.gloo import run_ranks
from tests.models.networks import SIZES

NO_VAE = VAESize(params=0, channels=0, downsampling=8)

FINE = {
    "num_experts": 48,
    "top_k": 5,
    "mlp_ratio": 0.5,
    "shared_expert_width": 48,
    "router_gate": "sigmoid",
    "normalize_top_k": True,
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_norm": True, "num_conditions": 1},
        {"mlp_kernel_size": 3},
        {"num_experts": 8, "expert_activation": "swiglu", "shared_expert_width": 192},
        {"num_experts": 8, "expert_activation": "swiglu"},
        {"num_experts": 8, "expert_activation": "gelu"},
        {"num_experts": 16, "expert_activation": "gelu", "batch": 1},
        {**FINE, "router_bias_balancing": True},
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
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

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
    """Dense on one rank; experts spread over two; with units for bf16, and the activation's chunks small beside a
    layer, as those of large networks are."""
    monkeypatch.setattr(upcast, "_UPCAST", frozenset())
    monkeypatch.setattr(gelu, "_CHUNK", 1024)
    config = UNDER_DEEPSPEED[network]
    estimate = memory(
        config, ranks=ep_size, ep_size=ep_size, micro_batch_size=4, precision=precision, zero_stage=stage, num_emas=0
    )
    for peak in run_ranks(ep_size, deepspeed_peak, config, ep_size, stage, precision, as_launched=True):
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
    estimate = picture_bytes(config, NO_VAE, precision="fp32") - weights
    assert 0.5 * estimate < live.peak <= estimate
    assert picture_bytes(config, NO_VAE, precision="fp32", guided=False) - weights == estimate / 2


def test_decoding_a_picture_stays_within_its_estimate():
    codec = load_vae()
    params = sum(p.numel() for p in codec.vae.parameters())
    latents = torch.randn(1, 4, 16, 16)
    with LiveBytes([latents, *codec.vae.parameters()]) as live:
        codec.decode(latents)
    config = ModelConfig(**SIZES)
    size = vae_size(vae_config("embedded"))
    shared = picture_bytes(config, NO_VAE, height=2, width=2)  # the copy of the network, next to nothing more
    estimate = picture_bytes(config, size, height=16, width=16) - shared - 4 * params
    assert 0.5 * estimate < live.peak <= estimate
    assert size == VAESize(params=params, channels=32, downsampling=8)
