"""Real runs, spread over ranks, ZeRO stages and experts: equal to those on one rank, and to a plain loop."""

from typing import Any

import pytest
import torch
from training_runs import ACCUMULATED, BF16, BIASES, STEPS, Runs, ToyRun, ep, marked, zero
from training_toys import MOE

from dpt.config.recipe import load_recipe
from dpt.models.dit import DiT
from dpt.training.data_loader import open_data_loader
from dpt.training.export import checkpoint_weights
from dpt.training.step import LossModule, Preparation

CHECKPOINTING = {"training.activation_checkpointing": True}
OBJECTIVES = {
    "min_snr": {"diffusion.prediction_type": "v_prediction", "diffusion.min_snr_gamma": 5.0},
    "rectified_flow": {"diffusion.prediction_type": "rectified_flow", "diffusion.vlb_weight": 0.0},
}
_EVERY_STAGE = {
    **{f"dense_zero{stage}": zero(stage) for stage in range(4)},
    **{f"moe_zero{stage}": zero(stage, MOE) for stage in range(4)},
}
SPREAD: dict[int, dict[str, dict[str, Any]]] = {  # ranks -> runs that must equal one rank's
    1: {
        **_EVERY_STAGE,
        "dense_accumulated": zero(1, ACCUMULATED),
        "moe_accumulated": zero(1, MOE, ACCUMULATED),
        "dense_checkpointing": zero(2, CHECKPOINTING),
        "moe_biases": zero(1, MOE, BIASES),
        "moe_biases_accumulated": zero(1, MOE, BIASES, ACCUMULATED),
        **{f"dense_{name}": zero(1, fields) for name, fields in OBJECTIVES.items()},
    },
    2: {
        **_EVERY_STAGE,
        "dense_accumulated": zero(2, ACCUMULATED),
        "moe_accumulated": ep(2, 2, ACCUMULATED),
        "moe_zero1_ep2": ep(1, 2),
        "moe_zero2_ep2": ep(2, 2),
        "moe_checkpointing_ep2": ep(1, 2, CHECKPOINTING),
        "moe_biases": ep(1, 2, BIASES),
        "moe_biases_accumulated": ep(1, 2, BIASES, ACCUMULATED),
        **{f"dense_{name}": zero(2, fields) for name, fields in OBJECTIVES.items()},
        "dense_offload": zero(2, {"zero_optimization.offload_optimizer": {"device": "cpu"}}),
        "dense_zero0_bf16": zero(0, BF16),
        "dense_zero1_bf16": zero(1, BF16),
        "dense_zero3_bf16": zero(3, BF16),
        "moe_zero2_ep2_bf16": ep(2, 2, BF16),
        "moe_zero1_ep2_fp16": ep(1, 2, {"fp16.enabled": True, "fp16.initial_scale_power": 12}),
    },
    4: {
        **_EVERY_STAGE,
        "dense_accumulated": zero(3, {"train_micro_batch_size_per_gpu": 1}),
        **{f"moe_zero{stage}_ep{ep_size}": ep(stage, ep_size) for stage in (1, 2) for ep_size in (2, 4)},
        "moe_biases": ep(2, 4, BIASES),
    },
}
FAST = {
    1: {"dense_zero0", "moe_zero0", "moe_accumulated", "dense_checkpointing", "moe_biases", "dense_min_snr"},
    2: {
        *("dense_zero0", "dense_zero1", "dense_accumulated", "dense_min_snr", "dense_offload", "dense_zero1_bf16"),
        *("moe_zero3", "moe_accumulated", "moe_zero1_ep2", "moe_biases", "moe_zero1_ep2_fp16"),
    },
    4: {"dense_zero2", "moe_zero1_ep4", "moe_zero2_ep2"},
}
"""All others are left to `make test-all`."""
SLOW = {f"{ranks}_{name}" for ranks, spread in SPREAD.items() for name in spread if name not in FAST[ranks]}


@pytest.fixture(scope="module")
def runs(toy_runs: Runs) -> Runs:
    for ranks, spread in SPREAD.items():
        named = {f"{ranks}_{name}": fields for name, fields in spread.items()}
        toy_runs.train(ranks, *(ToyRun(name=name, fields=fields, slow=name in SLOW) for name, fields in named.items()))
    return toy_runs


def _reference(name: str) -> str:
    """The run on one rank that `name` must equal."""
    if "biases" in name:
        return "moe_biases_accumulated" if "accumulated" in name else "moe_biases"
    if name == "moe_accumulated" or name.removeprefix("dense_") in OBJECTIVES:
        return name
    return f"{name.split('_')[0]}_zero0"


@pytest.mark.parametrize(
    ("ranks", "name"), [marked(SLOW, f"{ranks}_{name}", ranks, name) for ranks, spread in SPREAD.items() for name in spread]
)
def test_losses_and_weights_are_those_of_one_rank(runs: Runs, ranks: int, name: str) -> None:
    name, reference, half = f"{ranks}_{name}", f"1_{_reference(name)}", name.endswith("16")
    assert runs.history(name, "step") == list(range(1, STEPS + 1))
    first = runs.records(reference)[0]
    for key in ("train/loss", "train/grad_norm", "train/router_z_loss", "train/load_balancing_loss"):
        if key in first:
            wanted = pytest.approx(runs.history(reference, key), rel=3e-2 if half else 2e-4, abs=1e-5)
            assert runs.history(name, key) == wanted, key
    found, expected = (
        {r["step"]: r["experts/distance"] for r in runs.records(run) if r.get("experts/distance")} for run in (name, reference)
    )
    assert found.keys() == ({5, 10, STEPS} if "moe" in name else set())
    assert found == pytest.approx(expected, rel=3e-2 if half else 1e-4)
    weights, wanted_weights = runs.weights(name), runs.weights(reference)
    assert weights.keys() == wanted_weights.keys()
    if half:
        difference, size = (
            torch.stack([tensor.norm() for tensor in tensors]).norm()
            for tensors in ([weights[key] - wanted_weights[key] for key in weights], list(wanted_weights.values()))
        )
        assert difference < 0.02 * size
        return
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, wanted_weights[key], rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_losses_weights_and_averages_are_those_of_a_plain_loop(runs: Runs, name: str) -> None:
    """torch's own AdamW and clipping, without DeepSpeed, and averages kept by hand."""
    run = f"1_{name}_zero0"
    config = load_recipe(runs.recipe, SPREAD[1][f"{name}_zero0"]).dpt
    data_loader = open_data_loader(config, global_batch_size=8, micro_batch_size=8, start_sample=0, pin_memory=False)
    prepare = Preparation(
        config,
        tasks=data_loader.tasks,
        scaling=data_loader.scaling,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    torch.manual_seed(config.training.seed)
    module = LossModule(DiT(config.model), config)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.01)
    averages = {decay: {n: p.detach().clone() for n, p in module.network.named_parameters()} for decay in (0.9, 0.5)}
    batches = iter(data_loader.stream)
    for number, expected in enumerate(runs.records(run), 1):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(number / 3, 1.0)
        optimizer.zero_grad()
        losses = module(*prepare(next(batches)))
        losses.total.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5))
        optimizer.step()
        assert (float(losses.loss), norm) == pytest.approx((expected["train/loss"], expected["train/grad_norm"]), rel=2e-4)
        for decay, average in averages.items():
            now = min(decay, (1 + number) / (10 + number)) if config.training.ema_warmup else decay
            for key, parameter in module.network.named_parameters():
                average[key].lerp_(parameter.detach(), 1 - now)
    batches.close()  # type: ignore[attr-defined]
    checkpoint = runs.checkpoint(run)
    found = {decay: checkpoint_weights(checkpoint, ema=True, ema_decay=decay).state for decay in averages}
    found[0.0], averages[0.0] = checkpoint_weights(checkpoint, ema=False).state, dict(module.network.named_parameters())
    for decay, average in averages.items():
        for key, tensor in average.items():
            torch.testing.assert_close(found[decay][key], tensor.detach(), rtol=1e-3, atol=2e-4, msg=f"{decay} {key}")


def test_training_learns_and_averages_lag(runs: Runs) -> None:
    losses = runs.history("1_dense_zero0")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    weights = runs.weights("1_dense_zero0")
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(weights[name], weights[f"ema.{name}"])


def test_records_add_up(runs: Runs) -> None:
    found = runs.records("2_moe_zero1_ep2")
    last = found[-1]
    assert last["train/samples_seen"] == 8 * STEPS
    assert last["compute/train_macs"] == pytest.approx(8 * STEPS * 3 * last["compute/forward_macs"], rel=0.02)
    flops = 2 * last["compute/train_macs"] / (8 * STEPS) * last["perf/samples_per_second"]
    assert last["perf/matrix_peak_share"] == pytest.approx(flops / (2 * 1e12), rel=1e-6)
    assert 0 <= last["experts/min_load"] <= 1 <= last["experts/max_load"] <= 4 / 2
    assert 0 <= last["perf/data_wait"] <= 1
    assert last["perf/memory_gib"] > 0.1
    assert [record["train/learning_rate"] for record in found[:4]] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3])
