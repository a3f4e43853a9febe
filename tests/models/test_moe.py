"""Router, dispatch and experts on one device."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt.config.sections import ModelConfig
from dpt.models.dit import DiT
from dpt.models.experts import Dispatch
from dpt.models.moe import BIAS_STEP, EarlierRouting, MoE, Router, summarize, within_capacity
from tests.models.reference import activated, mlp

WIDTHS = {"hidden_size": 16, "num_heads": 2, "depth": 1}


def moe(seed=0, **fields) -> MoE:
    torch.manual_seed(seed)
    layer = MoE(ModelConfig(**{**WIDTHS, "num_experts": 4, **fields}))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def moe_by_hand(layer: MoE, x: torch.Tensor, top_k: int, normalize: bool, gate: str) -> torch.Tensor:
    """Every token through every expert, then weighted: the definition, at E / K times the cost."""
    logits = F.linear(x.float(), layer.gate.weight.float())
    weights, chosen = (logits.sigmoid() if gate == "sigmoid" else logits.softmax(-1)).topk(top_k)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    experts = layer.experts
    every = torch.stack([mlp(x, experts.kind, experts.weights, e) for e in range(layer.num_experts)], dim=-2)
    y = (every.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1])) * weights[..., None]).sum(-2)
    return y if layer.shared is None else y + layer.shared.down(activated(layer.shared.gate_up(x), "swiglu"))


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("top_k", "normalize", "shared"), [(1, False, 0), (2, True, 8), (3, False, 8), (4, True, 0)])
def test_equal_to_the_definition_with_gradients(kind, top_k, normalize, shared, gate):
    fields = {"expert_activation": kind, "router_gate": gate}
    layer = moe(top_k=top_k, normalize_top_k=normalize, shared_expert_width=shared, **fields).double()
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for y in (layer(x)[0], moe_by_hand(layer, x, top_k, normalize, gate)):
        results.append([y, *torch.autograd.grad((y * torch.arange(16)).mean(), [x, *layer.parameters()])])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)  # the router is float32


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 20))
def test_dispatch_sorts_once_and_combines_back(data, num_experts, tokens):
    k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    experts = torch.rand(tokens, num_experts, generator=generator).topk(k).indices
    kept = torch.rand(tokens, k, generator=generator) < 0.7 if data.draw(st.booleans()) else None
    if kept is not None:
        kept[0, 0] = True
    dispatch = Dispatch(experts, num_experts, kept)
    mask = torch.ones_like(experts, dtype=torch.bool) if kept is None else kept
    rows = dispatch.permute(torch.arange(tokens, dtype=torch.float32)[:, None])
    start = 0
    for e, count in enumerate(dispatch.counts.tolist()):
        assert rows[start : start + count, 0].tolist() == torch.where((experts == e) & mask)[0].tolist()
        start += count
    weights = torch.rand(tokens, k, generator=generator)
    combined = dispatch.combine(rows, weights)[:, 0]
    torch.testing.assert_close(combined, torch.arange(tokens) * (weights * mask).sum(1))


def test_dispatch_gradients():
    experts = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0]])
    kept = torch.tensor([[True, True], [False, True], [True, True], [True, False]])
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    for mask in (None, kept):
        dispatch = Dispatch(experts, 4, mask)
        assert torch.autograd.gradcheck(lambda x, w, d=dispatch: d.combine(d.permute(x).sin(), w), (x, weights))


def test_router_logits_are_float32_under_autocast_and_weights_are_raw_or_normalised():
    x = torch.randn(6, 16)
    for normalize in (False, True):
        router = Router(ModelConfig(**WIDTHS, num_experts=4, top_k=2, normalize_top_k=normalize))
        router.reset_parameters()
        exact = router(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router(x).probs_TE, exact.probs_TE)
        sums = exact.weights_TK.sum(1)
        assert torch.allclose(sums, torch.ones(6)) == normalize
    assert router.bfloat16()(x.bfloat16()).weights_TK.dtype == torch.float32


def test_losses_and_entropy_by_hand():
    layer = moe(num_experts=3, top_k=2)
    x = torch.randn(2, 4, 16)
    _, stats = layer(x)
    summary = summarize([stats, stats])
    logits = F.linear(x, layer.gate.weight).flatten(0, 1)
    probs = logits.softmax(-1)
    chosen = F.one_hot(probs.topk(2).indices, 3).sum(1).float()
    fractions = chosen.sum(0) / chosen.sum()
    torch.testing.assert_close(summary.load_balancing_loss, 2 * 3 * (fractions * probs.mean(0)).sum())
    torch.testing.assert_close(summary.router_z_loss, 2 * logits.exp().sum(-1).log().square().mean())
    entropy = torch.special.entr(probs).sum(-1).mean().double().expand(2)
    torch.testing.assert_close(summary.router_entropy, entropy, rtol=1e-5, atol=1e-6)
    assert summary.tokens_per_expert.tolist() == [chosen.sum(0).long().tolist()] * 2
    even = summarize([stats._replace(mean_probs=torch.full((3,), 1 / 3), counts=torch.tensor([5, 5, 5]))])
    torch.testing.assert_close(even.load_balancing_loss, torch.tensor(1.0))


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_share_the_balance_loss_of_their_step(parts):
    layer = moe(num_experts=3, top_k=2)
    x = torch.randn(8, 4, 16)
    whole = summarize([layer(x)[1]])
    values, gradients, expected, earlier = [], [], [], None
    for part in range(parts):
        out = summarize([layer(x.chunk(parts)[part])[1]], earlier)
        values.append(out.load_balancing_loss)
        gradients.append(torch.autograd.grad(out.load_balancing_loss, layer.gate.weight)[0])
        routing = (out.tokens_per_expert, out.router_probs)
        earlier = EarlierRouting(*routing) if earlier is None else earlier.plus(*routing)
        seen = F.linear(torch.cat(x.chunk(parts)[: part + 1]), layer.gate.weight).softmax(-1)  # [B, T, E]
        fractions = F.one_hot(seen.topk(2).indices, 3).float().mean(dim=(0, 1, 2))
        last = seen[-8 // parts :].flatten(0, 1)
        expected.append(torch.autograd.grad(3 * (fractions * last.mean(0)).sum(), layer.gate.weight)[0])
    torch.testing.assert_close(torch.stack(values).mean(), whole.load_balancing_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients, expected)  # with the fractions of all tokens so far
    torch.testing.assert_close(earlier.router_probs / parts, whole.router_probs)


def test_capacity_drops_the_lightest_of_each_sample_and_reports_the_share():
    layer = moe(num_experts=4, top_k=2, capacity_factor=1.0)
    x = torch.randn(3, 8, 16)
    routing = layer.gate(x.flatten(0, 1))
    kept = within_capacity(routing, 3, 4, 1.0).view(3, 8, 2)
    weights, experts = routing.weights_TK.view(3, 8, 2), routing.experts_TK.view(3, 8, 2)
    for sample in range(3):
        for e in range(4):
            mine = experts[sample] == e
            assert kept[sample][mine].sum() == min(4, mine.sum())
            if mine.sum() > 4:
                assert weights[sample][mine & kept[sample]].min() >= weights[sample][mine & ~kept[sample]].max()
    y, stats = layer(x)
    assert stats.dropped == (~kept).sum()
    assert summarize([stats]).dropped_share == (~kept).sum() / kept.numel()
    torch.testing.assert_close(y[1:2], layer(x[1:2])[0])  # a sample's result depends on nothing else in its batch
    wide = moe(num_experts=4, top_k=2, capacity_factor=4.0)
    assert torch.equal(wide(x)[0], moe(num_experts=4, top_k=2)(x)[0])


def test_loss_free_bias_moves_choices_not_weights():
    model = DiT(ModelConfig(**WIDTHS, num_experts=4, router_bias_balancing=True, num_classes=3, input_size=4))
    gate = model.blocks[0].moe.gate
    model.update_router_bias(torch.tensor([[9, 1, 5, 5]]))
    assert gate.bias_steps.tolist() == [-1, 1, 0, 0]
    x = torch.randn(20, 16)
    for _ in range(7):  # one expert gets nothing: its bias rises, and all sink so that their mean stays about zero
        model.update_router_bias(torch.tensor([[9, 0, 9, 9]]))
    assert gate.bias_steps[1] - gate.bias_steps[2] == 1 + 2 * 7
    assert abs(gate.bias_steps.double().mean()) <= 0.5
    gate.bias_steps.copy_(torch.tensor([0, 0, 0, int(2 / BIAS_STEP)]))
    routing = gate(x)
    assert (routing.experts_TK[:, 0] == 3).all()
    torch.testing.assert_close(routing.weights_TK, routing.probs_TE.gather(1, routing.experts_TK))
    assert model.bfloat16().blocks[0].moe.gate.bias_steps.tolist() == [0, 0, 0, 2000]


@pytest.mark.parametrize("normalize", [False, True])
def test_sigmoid_gates_by_hand(normalize):
    """Each expert's own sigmoid; the bias chooses, and is no part of the weights; the balance loss takes shares of the sum."""
    fields = {"normalize_top_k": normalize, "router_bias_balancing": True, "router_gate": "sigmoid"}
    router = Router(ModelConfig(**WIDTHS, num_experts=6, top_k=2, **fields))
    router.reset_parameters()
    router.bias_steps.copy_(torch.tensor([0, 0, 0, 0, 0, int(2 / BIAS_STEP)]))
    x = torch.randn(40, 16)
    routing = router(x)
    gates = (x @ router.weight.T).sigmoid()
    assert (routing.experts_TK[:, 0] == 5).all()
    assert torch.equal(routing.experts_TK[:, 1], gates[:, :5].argmax(1))
    chosen = gates.gather(1, routing.experts_TK)
    torch.testing.assert_close(routing.weights_TK, chosen / chosen.sum(1, keepdim=True) if normalize else chosen)
    torch.testing.assert_close(routing.probs_TE, gates / gates.sum(1, keepdim=True))
    torch.testing.assert_close(routing.entropy, torch.distributions.Categorical(routing.probs_TE).entropy().mean())
    assert routing.z_loss == 0
    (gradient,) = torch.autograd.grad((routing.probs_TE.mean(0) * torch.arange(6)).sum(), router.weight)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        router.weight.zero_().add_(-1.0)
    lost = router(1e3 * torch.ones(3, 16))  # every gate is 0
    assert lost.weights_TK.isfinite().all()
    assert lost.probs_TE.isfinite().all()
