"""Expert parallelism on gloo ranks: outputs, losses and gradients are those of one device."""

import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist

from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models.dit import DiT
from dpt.models.moe import EarlierRouting
from tests.gloo import run_ranks
from tests.models.networks import gradients

CONFIG = ModelConfig(
    hidden_size=16, depth=2, num_heads=2, input_size=4, num_classes=4, num_experts=4, top_k=2, shared_expert_width=8
)
GELU = ModelConfig(
    hidden_size=16, depth=1, num_heads=2, input_size=4, num_classes=4, num_experts=4, top_k=3, expert_activation="gelu"
)


def launch(ranks, function, *args):
    return run_ranks(ranks, function, *args, as_launched=True)


def build(config, ep_size=1):
    torch.manual_seed(0)
    model = DiT(config, ep_size=ep_size)
    if ep_size > 1:  # what deepspeed.initialize does
        for module in model.modules():
            if hasattr(module, "set_deepspeed_parallelism"):
                module.set_deepspeed_parallelism()
    torch.manual_seed(1)  # no zeros, and the same experts on every rank count
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch(size=4):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size, 4, 4, 4, generator=generator), torch.arange(size), torch.arange(size) % 4


def join_experts(model, tensors):
    """Tensors by parameter name, those of experts joined over the ranks that share them."""
    from dpt.models.moe_parallel import ParallelMoE

    joined = dict(tensors)
    for layer_name, layer in model.named_modules():
        if isinstance(layer, ParallelMoE):
            for name in [f"{layer_name}.experts.{n}" for n, _ in layer.experts.named_parameters()]:
                parts = [torch.empty_like(joined[name]) for _ in range(layer.ep_size)]
                dist.all_gather(parts, joined[name].contiguous(), group=layer.ep_group)
                joined[name] = torch.cat(parts)
    return joined


def step(config, ep_size, checkpointing=False):
    """This rank's part of the batch: outputs, losses, and gradients averaged as DeepSpeed does, experts joined."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(config, ep_size)
    model.set_activation_checkpointing(checkpointing)
    out, grads = gradients(model, [x.chunk(world)[rank] for x in batch()])
    for name, grad in grads.items():
        grad /= world
        if ".experts." not in name or ep_size == 1:
            dist.all_reduce(grad)
        elif ep_size < world:
            replicas = [dist.new_group([r for r in range(world) if r % ep_size == e]) for e in range(ep_size)]
            dist.all_reduce(grad, group=replicas[rank % ep_size])
    weights = join_experts(model, {n: p.detach() for n, p in model.named_parameters()})
    losses = torch.stack([out.load_balancing_loss, out.router_z_loss]).detach()
    return out.prediction.detach(), losses, out.tokens_per_expert, join_experts(model, grads), weights


@pytest.fixture(scope="module")
def one_device():
    models = {config: build(config) for config in (CONFIG, GELU)}
    return {config: (model, *gradients(model, batch())) for config, model in models.items()}


@pytest.mark.parametrize(
    ("config", "world", "ep_size", "checkpointing"),
    [(CONFIG, 2, 1, False), (CONFIG, 2, 2, True), (GELU, 4, 2, False), (CONFIG, 4, 4, False)],
)
def test_equal_to_one_device(one_device, config, world, ep_size, checkpointing):
    model, expected, wanted = one_device[config]
    ranks = launch(world, step, config, ep_size, checkpointing)
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), expected.prediction, atol=2e-6, rtol=1e-5)
    for _, losses, counts, _, _ in ranks:
        torch.testing.assert_close(losses, torch.stack([expected.load_balancing_loss, expected.router_z_loss]))
        assert torch.equal(counts, expected.tokens_per_expert)
    _, _, _, found, weights = ranks[0]
    torch.testing.assert_close(weights, {n: p.detach() for n, p in model.named_parameters()}, atol=0, rtol=0)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def mean_losses(splits):
    """For each number of micro-batches, the means of the balance loss and z-loss over them, and the sums of the counts."""
    model, world = build(CONFIG), dist.get_world_size()
    results = []
    for number in splits:
        earlier, losses = EarlierRouting(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4).double()), []
        for part in range(number):  # a global micro-batch is a part of the global batch, each rank has its share of it
            mine = (x.chunk(number)[part].chunk(world)[dist.get_rank()] for x in batch(16))
            out = model(*mine, earlier=earlier if part else None)
            losses.append(torch.stack([out.load_balancing_loss, out.router_z_loss]).detach())
            earlier = earlier.plus(out.tokens_per_expert, out.router_probs)
        results.append((torch.stack(losses).mean(dim=0), earlier.tokens_per_expert))
    return results


def test_losses_of_the_global_batch_do_not_depend_on_how_it_is_split():
    """Over 1, 2 or 4 ranks, and into 1, 2, 4 or 16 micro-batches."""
    out = build(CONFIG)(*batch(16))
    expected = torch.stack([out.load_balancing_loss, out.router_z_loss])
    for world, splits in ((1, (1, 2, 4, 16)), (2, (1, 2, 8)), (4, (1, 4))):
        for results in run_ranks(world, mean_losses, splits):
            for losses, counts in results:
                torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
                assert torch.equal(counts, out.tokens_per_expert)


def state_dicts(config):
    model = build(config, 2)
    state = model.state_dict()
    keys = sorted(k for k in state if "blocks.0.moe" in k)
    other = build(config, 2)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(state)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    full = build(config).state_dict()
    other.load_state_dict(full)
    mine = full["blocks.0.moe.experts.down_weight"][dist.get_rank() * 2 :][:2]
    marks = {(p.allreduce, p.group_name) for n, p in model.named_parameters() if ".experts." in n}
    return keys, same, torch.equal(other.blocks[0].moe.experts.down_weight, mine), marks


def test_state_dict_has_deepspeeds_names_and_takes_complete_weights():
    for keys, same, cut, marks in launch(2, state_dicts, CONFIG):
        local = "blocks.0.moe.deepspeed_moe.experts.deepspeed_experts"
        assert keys == sorted(
            [f"{local}.{e}.{n}" for e in (0, 1) for n in ("gate_up_weight", "down_weight")]
            + [f"blocks.0.moe.{n}" for n in ("gate.weight", "shared.gate_up.weight", "shared.down.weight")]
        )
        assert same
        assert cut
        assert marks == {(False, "ep_size_2")}


def no_tokens_on_one_rank():
    model = build(dataclasses.replace(CONFIG, router_bias_balancing=True), 2)
    for block in model.blocks:
        block.moe.gate.bias_steps[:2] = 10**6  # every token to experts 0 and 1, which rank 0 holds
    out = model(*batch())
    out.prediction.sum().backward()
    return [float(p.grad.abs().sum()) for n, p in model.named_parameters() if "down_weight" in n]


def test_a_rank_whose_experts_get_no_token_takes_part():
    first, second = launch(2, no_tokens_on_one_rank)
    assert all(g > 0 for g in first)
    assert second == [0.0, 0.0]


def different_numbers_of_batches():
    model = build(CONFIG)
    with torch.no_grad():
        for _ in range(1 + dist.get_rank()):
            out = model(*batch())
    return out.tokens_per_expert.sum().item()


def test_ranks_may_evaluate_different_numbers_of_batches():
    assert run_ranks(2, different_numbers_of_batches) == [2 * 4 * 4 * 2] * 2


def test_an_ep_size_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="needs that many processes"):
        DiT(CONFIG, ep_size=2)

    def refused():
        with pytest.raises(UserError, match="does not divide"):
            DiT(CONFIG, ep_size=3)

    run_ranks(1, refused)


def deepspeed_checkpoint(folder):
    """DeepSpeed's own checkpoint of a network with spread experts, saved and loaded."""
    import deepspeed

    model = build(CONFIG, 2)
    groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.1), config=config)
    engine.backward(engine(*batch()).prediction.square().mean())
    engine.step()
    engine.save_checkpoint(folder, tag="one")
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    engine.load_checkpoint(folder, tag="one")
    return all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_deepspeed_checkpoints_each_expert_by_its_global_id(tmp_path):
    assert launch(2, deepspeed_checkpoint, str(tmp_path)) == [True, True]
    names = sorted(path.name for path in (tmp_path / "one").glob("layer_*"))
    assert names == sorted(f"layer_{n}_expert_{e}_mp_rank_00_model_states.pt" for n in range(2) for e in range(4))


def overlap_events():
    """What happens between the beginnings and ends of the exchanges of one layer, forward and backward."""
    model = build(dataclasses.replace(GELU, shared_expert_width=8), ep_size=2)
    from dpt.models import grouped_mlp, moe_parallel

    events = []
    start, wait, real_mm = moe_parallel._Exchange.start, moe_parallel._Exchange.wait, grouped_mlp.mm
    moe_parallel._Exchange.start = lambda self, x, back=False: (events.append("start"), start(self, x, back=back))[1]
    moe_parallel._Exchange.wait = lambda self: (events.append("wait"), wait(self))[1]
    grouped_mlp.mm = lambda *a, **k: (events.append("experts"), real_mm(*a, **k))[1]
    layer = model.blocks[0].moe
    layer.shared.register_forward_hook(lambda *_: events.append("shared forward"))
    layer.shared.down.weight.register_hook(lambda grad: events.append("shared backward"))
    x = torch.randn(2, 4, 16, requires_grad=True)
    y = layer(x)[0]
    events.append("backward")
    y.sum().backward()
    return [e for e, _ in itertools.groupby(events)]


def test_exchanges_overlap_with_the_shared_expert_and_with_weight_gradients():
    for events in launch(2, overlap_events):
        assert events == [
            *("start", "shared forward", "wait", "experts", "start", "wait"),
            "backward",
            *("start", "wait", "experts", "start", "experts", "shared backward", "wait"),
        ]
