"""Muon: matrices are made orthogonal each by itself, wherever ZeRO cuts them; all else is AdamW's."""

import itertools

import pytest
import torch
from training_runs import BF16, Runs, ToyRun, ep, interrupted, marked, zero
from training_toys import MOE, make_recipe

from benchmarks.memory import LiveBytes
from dpt.config.checks import check_recipe
from dpt.config.recipe import load_recipe
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models.costs import macs, muon_macs, muon_params
from dpt.models.dit import DiT
from dpt.models.memory import memory
from dpt.training.checkpoint import CheckpointReader
from dpt.training.fragments import Fragment
from dpt.training.groups import parameter_groups
from dpt.training.muon import Muon, matrices, orthogonal, runs
from dpt.training.optimizer import DEFAULTS, AdamWEMA, optimizer_options

OPTIONS = DEFAULTS | {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95}
SHAPES = {
    "blocks.0.attn.qkv.weight": (3, (12, 4)),
    "blocks.0.attn.proj.weight": (1, (4, 4)),
    "blocks.0.adaLN_modulation.1.weight": (6, (24, 4)),
    "blocks.0.mlp.fc1.weight": (1, (16, 4)),
    "blocks.0.moe.experts.gate_up_weight": (6, (3, 16, 4)),
    "blocks.0.moe.experts.down_weight": (3, (3, 4, 8)),
    "blocks.0.moe.shared.gate_up.weight": (2, (12, 4)),
}
"""Parameters and how many matrices are in each."""


@pytest.mark.parametrize("shape", [(5, 24, 12), (2, 48, 16), (1, 16, 48)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.tensor(1e-6)
    values = torch.linalg.svdvals(orthogonal(stack))
    assert values.min() > 0.3
    assert values.max() < 1.3
    for matrix, made in zip(stack, orthogonal(stack), strict=True):  # each by itself, and in its own directions
        torch.testing.assert_close(made, orthogonal(matrix[None])[0], atol=1e-5, rtol=1e-4)
        left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        inner = left.T @ made.double() @ right.T
        assert (inner - inner.diagonal().diag()).abs().max() < 1e-3
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_which_parameters_are_stacks_of_matrices() -> None:
    for name, (count, shape) in SHAPES.items():
        stack = matrices(name, shape)
        assert stack is not None
        assert stack[0] == count
        assert stack[0] * stack[1] * stack[2] == torch.Size(shape).numel()
    config = ModelConfig(hidden_size=32, num_heads=2, depth=2, num_experts=4, shared_expert_width=16, clip_embedding_size=6)
    for fields in (config, ModelConfig(hidden_size=32, num_heads=2, depth=2)):
        network = DiT(fields)
        ours = {name: p for name, p in network.named_parameters() if matrices(name, p.shape)}
        rest = {name for name, _ in network.named_parameters()} - ours.keys()
        assert all(name.startswith("blocks.") for name in ours)
        assert all(not n.startswith("blocks.") or n.endswith(("bias", "gate.weight")) for n in rest)
        assert (sum(p.numel() for p in ours.values()), max(p.numel() for p in ours.values())) == muon_params(fields)
        groups = parameter_groups(network, fields, 0.0, with_muon=True)
        assert sum(len(group["params"]) for group in groups if group["muon"]) == len(ours)


def _by_hand(weight: torch.Tensor, stack: tuple[int, int, int], gradients: list[torch.Tensor]) -> torch.Tensor:
    weight, momentum = weight.clone(), torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        update = orthogonal((0.05 * gradient + 0.95 * momentum).view(stack)).view_as(weight)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * 0.2 * max(stack[1:]) ** 0.5 * update
    return weight


@pytest.mark.parametrize("name", SHAPES)
def test_updates_are_those_of_the_formula(name: str) -> None:
    shape = SHAPES[name][1]
    generator = torch.Generator().manual_seed(0)
    weight, other = torch.nn.Parameter(torch.randn(shape, generator=generator)), torch.nn.Parameter(torch.ones(3))
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    stack = matrices(name, shape)
    assert stack is not None
    expected = _by_hand(weight.detach(), stack, gradients)
    groups = [{"params": [other], "muon": False}, {"params": [weight], "muon": True}]
    optimizer = Muon(groups, OPTIONS, ema_decays=[0.5])
    numel = weight.numel()
    optimizer.set_layout([Fragment(name=name, shape=shape, offset=0, numel=numel, flat=weight, start=0, owned=True)])
    plain = torch.nn.Parameter(torch.ones(3))
    reference = AdamWEMA([plain], {key: value for key, value in OPTIONS.items() if key != "momentum"})
    for gradient in gradients:
        weight.grad, other.grad, plain.grad = gradient, torch.ones(3), torch.ones(3)
        for each in (optimizer, reference):
            each.step()
            each.updates += 1
    torch.testing.assert_close(weight.detach(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(other, plain)
    assert optimizer.names_of(weight) == ["momentum", "ema0"]
    assert optimizer.names_of(other) == ["exp_avg", "exp_avg_sq", "ema0"]


def test_a_cut_leaves_whole_matrices_and_parts() -> None:
    name, shape = "blocks.0.adaLN_modulation.1.weight", (24, 4)  # six matrices of 16
    for low, high in itertools.combinations(range(0, 97, 4), 2):
        fragment = Fragment(name=name, shape=shape, offset=low, numel=high - low, flat=torch.arange(100.0), start=3, owned=True)
        found = list(runs(fragment))
        assert [element for run in found for element in range(run.low, run.high)] == list(range(low, high))
        assert sum(run.is_whole for run in found) <= 1
        assert all(len(run.matrices) == 1 for run in found if not run.is_whole)
        for run in found:
            assert run.of(fragment.flat)[0] == 3 + run.low - low
            assert run.matrices.start * 16 <= run.low < run.high <= run.matrices.stop * 16


MUON = {"optimizer.type": "Muon", "training.steps": 9}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (zero(3, MUON), "Muon needs whole matrices, which ZeRO stage 3 cuts up; set zero_optimization.stage to 2"),
        (zero(1, MUON, {"zero_optimization.offload_optimizer.device": "cpu"}), "offload_optimizer does not go with"),
        ({"optimizer.type": "Lion"}, "optimizer.type is \"Lion\"; the optimizers here are AdamW and Muon"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, fields: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as refusal:
        check_recipe(load_recipe(make_recipe(tmp_path / "run.json", []), fields), 1)
    assert words in str(refusal.value)


def test_options() -> None:
    assert optimizer_options({"type": "Muon", "params": {"momentum": 0.9}})["momentum"] == 0.9
    with pytest.raises(UserError, match="momentum is unknown; AdamW takes"):
        optimizer_options({"params": {"momentum": 0.9}})


def test_the_plan_counts_one_moment_of_matrices_and_their_workspace() -> None:
    config = ModelConfig(hidden_size=256, num_heads=4, depth=4)
    adam, muon = (memory(config, ranks=2, micro_batch_size=1, muon=muon) for muon in (False, True))
    assert adam.moments - muon.moments == pytest.approx(4 * muon_params(config)[0] / 2, abs=8)
    assert adam.orthogonal == 0
    assert muon.orthogonal == max(0, 24 * muon_params(config)[1] - muon.activations)


@pytest.mark.parametrize(
    ("name", "shape"), [("adaLN_modulation.1.weight", (576, 96)), ("moe.experts.gate_up_weight", (8, 768, 96))]
)
def test_the_workspace_is_within_what_is_planned(name: str, shape: tuple[int, ...]) -> None:
    weight = torch.nn.Parameter(torch.randn(shape))
    weight.grad, numel = torch.randn(shape), weight.numel()
    optimizer = Muon([{"params": [weight], "muon": True}], OPTIONS)
    held = Fragment(name=f"blocks.0.{name}", shape=shape, offset=0, numel=numel, flat=weight, start=0, owned=True)
    optimizer.set_layout([held])
    with LiveBytes([weight, weight.grad, *optimizer.ensure_state(weight).values()]) as live:
        optimizer.step()
    assert 0.7 * 24 * numel < live.peak <= 24.1 * numel


def test_products_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    fields = {"hidden_size": 32, "num_heads": 2, "depth": 2, "shared_expert_width": 16}
    for config in (ModelConfig(**fields), ModelConfig(num_experts=4, **fields)):
        counter = FlopCounterMode(display=False)
        with counter:
            for name, parameter in DiT(config).named_parameters():
                if stack := matrices(name, parameter.shape):
                    orthogonal(parameter.detach().view(stack))
        assert counter.get_total_flops() == 2 * muon_macs(config)


# --- real runs --------------------------------------------------------------------------------------------------------------

STRAIGHT = {"dense": zero(1, MUON), "experts": zero(1, MOE, MUON), "mup": zero(1, MUON, {"model.base_width": 8})}
LAYOUTS = {
    **{f"dense_zero{stage}": zero(stage, MUON) for stage in range(3)},
    "experts_zero2": zero(2, MOE, MUON),
    "experts_ep2": ep(2, 2, MUON),
    "mup_zero2": zero(2, MUON, {"model.base_width": 8}),
}
HALF = {f"bf16_zero{stage}": zero(stage, BF16, MUON) for stage in range(3)}
SLOW = {"dense_zero0", "experts_zero2", "bf16_zero0", "bf16_zero1"}
"""Left to `make test-all`."""
LEGS = ((1, 3), (2, 6), (4, -1))
"""Ranks of a run, and the step at which it is resumed with others."""


@pytest.fixture(scope="module")
def trained(toy_runs: Runs) -> Runs:
    road = [ToyRun(name="road", fields=zero(1 + (ranks > 1), MUON), sigterm_at=at) for ranks, at in LEGS]
    toy_runs.train(1, road[0], *(ToyRun(name=name, fields=fields) for name, fields in STRAIGHT.items()))
    toy_runs.train(
        2,
        road[1],
        *(ToyRun(name=name, fields=fields, slow=name in SLOW) for name, fields in (LAYOUTS | HALF).items()),
        *interrupted("parts", LAYOUTS["experts_ep2"], 5),
        ToyRun(name="adam", fields=zero(1), sigterm_at=4),
        ToyRun(name="adam", fields=zero(1, MUON), ends=None),
    )
    toy_runs.train(4, road[2])
    return toy_runs


@pytest.mark.parametrize("name", [marked(SLOW, name) for name in (*LAYOUTS, "road")])
def test_any_number_of_ranks_makes_the_same_updates(trained: Runs, name: str) -> None:
    wanted = "dense" if name == "road" else name.split("_")[0]
    trained.check_close(name, wanted, rel=2e-4)
    readers = [CheckpointReader(trained.checkpoint(run), trained.state(run)) for run in (name, wanted)]
    for parameter, shape in trained.state(name)["parameters"].items():
        kinds = ("momentum",) if matrices(parameter, shape) else ("exp_avg", "exp_avg_sq")
        for kind in ("master", "ema0", *kinds):
            found, expected = (each.whole(kind, parameter, shape) for each in readers)
            assert (found - expected).norm() <= 2e-3 * expected.norm() + 1e-7, (kind, parameter)


def test_a_continued_run_is_the_same_bit_for_bit(trained: Runs) -> None:
    trained.check_equal("parts", "experts_ep2")


def test_compute_counts_muon(trained: Runs) -> None:
    model = load_recipe(trained.recipe).dpt.model
    found = trained.records("dense")[-1]
    assert found["compute/train_macs"] == found["train/samples_seen"] * (macs(model).training + muon_macs(model) // 8)


@pytest.mark.parametrize("name", [marked(SLOW, name) for name in HALF])
def test_bf16_trains(trained: Runs, name: str) -> None:
    trained.check_close(name, "dense", rel=0.05)


def test_states_of_the_other_optimizer_are_refused(trained: Runs) -> None:
    refusal = "holds the states of AdamW, and optimizer.type is Muon; set it back, or start another run from its weights"
    assert refusal in trained.ended["adam"][1]
