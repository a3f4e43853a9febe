"""Upcycled networks compute what the dense ones do; adapted weights fit the network that is fine-tuned."""

import dataclasses

import pytest
import torch

from dpt.config.presets import PRESETS, preset_values
from dpt.config.sections import ModelConfig, UpcyclingConfig
from dpt.errors import UserError
from dpt.models import Weights, adapt, build_model, upcycle
from dpt.models.expert_distance import expert_distances
from tests.models.networks import SIZES, batch, random_model

DENSE = [name for name, values in PRESETS.items() if "num_experts" not in values]


def dense(**fields) -> Weights:
    model = random_model(**fields)
    return Weights(config=model.config, state=model.state_dict())


def predict(weights, latents=None, labels=None):
    model = weights.build()
    usual_latents, _, usual_labels = batch(model)
    latents, labels = usual_latents if latents is None else latents, usual_labels if labels is None else labels
    timesteps = torch.tensor([1, 300, 500, 999])  # whatever the network's channels
    with torch.no_grad():
        return model(latents, timesteps, labels).prediction


@pytest.mark.parametrize("preset", DENSE)
def test_every_dense_family_is_preserved(preset):
    """At each preset's heads and patch size, at small width and depth."""
    values = preset_values(preset)
    width = 4 * values["num_heads"]
    weights = dense(**values | {"hidden_size": width, "depth": 3, "input_size": values["patch_size"] * 2})
    torch.testing.assert_close(predict(upcycle(weights, UpcyclingConfig())), predict(weights), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("experts", "top_k", "granularity"), [(1, 1, 1), (4, 1, 1), (16, 3, 1), (2, 2, 4), (4, 2, 2), (8, 2, 8)]
)
def test_any_number_of_experts_and_any_granularity_is_preserved(experts, top_k, granularity):
    weights = dense()
    upcycled = upcycle(weights, UpcyclingConfig(num_experts=experts, top_k=top_k, granularity=granularity))
    assert upcycled.config.num_experts == experts * granularity
    assert upcycled.state["blocks.0.moe.experts.fc1_weight"].shape == (experts * granularity, 128 // granularity, 32)
    torch.testing.assert_close(predict(upcycled), predict(weights), atol=1e-5, rtol=1e-5)


def test_granular_experts_are_chosen_together():
    upcycled = upcycle(dense(), UpcyclingConfig(num_experts=4, top_k=2, granularity=2))
    model = upcycled.build()
    counts = model(*batch(model)).tokens_per_expert
    assert torch.equal(counts[:, 0::2], counts[:, 1::2])


def test_raw_weights_scale_the_mlp_by_their_sum():
    weights = dense(depth=1)
    upcycled = upcycle(weights, UpcyclingConfig(normalize_top_k=False))
    x = torch.randn(2, 4, 32)
    layer, mlp = upcycled.build().blocks[0].moe, weights.build().blocks[0].mlp
    with torch.no_grad():
        sums = layer.gate(x.flatten(0, 1)).weights_TK.sum(1).view(2, 4, 1)
        torch.testing.assert_close(layer(x)[0], sums * mlp(x))
    assert sums.max() < 0.9


def test_noise_breaks_the_symmetry_by_its_measure_and_is_reproducible():
    weights = dense(hidden_size=64)
    noisy = upcycle(weights, UpcyclingConfig(noise_std=0.1), seed=5)
    again = upcycle(weights, UpcyclingConfig(noise_std=0.1), seed=5)
    assert all(torch.equal(noisy.state[n], again.state[n]) for n in noisy.state)
    name, source = "blocks.1.moe.experts.fc2_weight", weights.state["blocks.1.mlp.fc2.weight"]
    difference = noisy.state[name] - source
    assert difference.std() == pytest.approx(0.1 * float(source.std()), rel=0.02)
    assert not torch.equal(noisy.state[name][0], noisy.state[name][1])
    other = upcycle(weights, UpcyclingConfig(noise_std=0.1), seed=6)
    assert not torch.equal(noisy.state["blocks.0.moe.gate.weight"], other.state["blocks.0.moe.gate.weight"])


def test_upcycling_refuses_what_it_cannot_do():
    upcycled = upcycle(dense(), UpcyclingConfig())
    with pytest.raises(UserError, match="already"):
        upcycle(upcycled, UpcyclingConfig())
    with pytest.raises(UserError, match="granularity 3"):
        upcycle(dense(), UpcyclingConfig(granularity=3))
    shared = adapt(dense(), dataclasses.replace(dense().config, shared_expert_width=16))
    with pytest.raises(UserError, match=r"shared_expert_width is 16; .* set it to 0"):
        upcycle(shared, UpcyclingConfig())


# --- adapting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [2, 3])
def test_widened_patch_embedding_averages_its_images(images):
    weights = dense()
    wide = adapt(weights, dataclasses.replace(weights.config, num_conditions=images - 1))
    latents = torch.randn(4, 4, 4, 4)
    torch.testing.assert_close(predict(wide, latents.repeat(1, images, 1, 1)), predict(weights, latents), atol=1e-5, rtol=1e-5)
    separate = torch.randn(4, 4 * images, 4, 4)
    mean = separate.view(4, images, 4, 4, 4).mean(1)
    torch.testing.assert_close(predict(wide, separate), predict(weights, mean), atol=1e-5, rtol=1e-5)


def test_new_labels_are_means_of_class_rows_and_null_moves():
    weights = dense(num_classes=1000)
    table = weights.state["y_embedder.embedding_table.weight"]
    adapted = adapt(weights, dataclasses.replace(weights.config, num_classes=1004))
    new = adapted.state["y_embedder.embedding_table.weight"]
    assert torch.equal(new[:1000], table[:1000])
    for i in range(4):
        torch.testing.assert_close(new[1000 + i], table[250 * i : 250 * (i + 1)].mean(0))
    assert torch.equal(new[1004], table[1000])


def test_task_convolutions_start_equal_and_the_clip_projection_at_zero():
    weights = dense(num_classes=1000)
    target = dataclasses.replace(
        weights.config, num_classes=1004, num_conditions=2, patch_embed_tasks=4, clip_embedding_size=6, input_size=16
    )
    wide = adapt(weights, dataclasses.replace(weights.config, num_classes=1004, num_conditions=2))
    adapted = adapt(weights, target)
    latents, labels = torch.randn(4, 12, 8, 4), torch.tensor([1000, 1003, 1001, 1002])
    torch.testing.assert_close(predict(adapted, latents, labels), predict(wide, latents, labels), atol=1e-5, rtol=1e-5)
    assert not adapted.state["clip_embedder.weight"].any()
    assert adapt(adapted, target).state.keys() == adapted.state.keys()
    upcycled = upcycle(adapted, UpcyclingConfig())
    torch.testing.assert_close(predict(upcycled, latents, labels), predict(wide, latents, labels), atol=1e-5, rtol=1e-5)


def test_routing_bias_comes_and_goes():
    weights = upcycle(dense(), UpcyclingConfig())
    biased = adapt(weights, dataclasses.replace(weights.config, router_bias_balancing=True))
    assert torch.equal(predict(biased), predict(weights))
    assert adapt(biased, weights.config).state.keys() == weights.state.keys()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"depth": 3}, "depth is 3"),
        ({"num_classes": 4}, "num_classes"),
        ({"qk_norm": True}, "qk_norm"),
        ({"num_experts": 4}, "num_experts"),
    ],
)
def test_other_differences_are_refused(fields, named):
    weights = dense()
    with pytest.raises(UserError, match=named):
        adapt(weights, dataclasses.replace(weights.config, **fields))


def test_differences_of_experts_and_of_inputs_are_refused():
    weights = dense()
    adapt(weights, dataclasses.replace(weights.config, top_k=1))  # means nothing without experts
    adapt(weights, dataclasses.replace(weights.config, base_head_size=8))  # nor this without muP
    experts = upcycle(weights, UpcyclingConfig())
    with pytest.raises(UserError, match="top_k is 1"):
        adapt(experts, dataclasses.replace(experts.config, top_k=1))
    routed = adapt(weights, dataclasses.replace(weights.config, patch_embed_tasks=2, num_conditions=1))
    with pytest.raises(UserError, match="patch_embed_tasks"):
        adapt(routed, dataclasses.replace(routed.config, patch_embed_tasks=0))
    with pytest.raises(UserError, match="num_conditions"):
        adapt(routed, dataclasses.replace(routed.config, num_conditions=2))


@pytest.mark.parametrize("granularity", [1, 2])
def test_redrawn_units_have_the_statistics_of_what_they_replace(granularity):
    """A share of each expert's hidden units, its own, in both layers; the rest are copies; routers and noise are as without."""
    weights = dense(hidden_size=64, depth=1)
    settings = {"num_experts": 4, "granularity": granularity}
    plain = upcycle(weights, UpcyclingConfig(**settings), seed=3).state
    drawn = upcycle(weights, UpcyclingConfig(**settings, reinit_share=0.25), seed=3)
    again = upcycle(weights, UpcyclingConfig(**settings, reinit_share=0.25), seed=3)
    assert all(torch.equal(drawn.state[n], again.state[n]) for n in plain)
    width = 256 // granularity
    prefix, units = "blocks.0.moe.experts.", []
    for name, kind in (("fc1_weight", 2), ("fc1_bias", None), ("fc2_weight", 1)):
        moved = drawn.state[prefix + name] != plain[prefix + name]
        moved = moved if kind is None else moved.all(kind)
        units.append(moved)
        assert moved.sum(1).tolist() == [width // 4] * 4 * granularity
    assert all(torch.equal(moved, units[0]) for moved in units)
    assert not torch.equal(units[0][0], units[0][-1])
    rest = {n for n in plain if not torch.equal(plain[n], drawn.state[n])}
    assert rest == {prefix + n for n in ("fc1_weight", "fc1_bias", "fc2_weight")}
    for expert, moved in enumerate(units[0]):
        for name in ("fc1_weight", "fc2_weight"):
            old, new = (state[prefix + name][expert] for state in (plain, drawn.state))
            old, new = (x[moved] if name == "fc1_weight" else x[:, moved] for x in (old, new))
            assert new.std() == pytest.approx(old.std().item(), rel=0.05)
            assert new.mean() == pytest.approx(old.mean().item(), abs=4 * old.std().item() / old.numel() ** 0.5)


def test_redrawing_all_makes_experts_strangers_and_a_share_less_so():
    distances = {}
    for share in (0.0, 0.25, 1.0):
        config = UpcyclingConfig(num_experts=4, reinit_share=share)
        distances[share] = expert_distances(upcycle(dense(hidden_size=64), config).build())
    assert distances[0.0].max() < 1e-6
    # A unit differs between two experts if it is drawn in either: 1 - (1 - r)^2 of them.
    expected = (2 * (1 - 0.75**2)) ** 0.5
    torch.testing.assert_close(distances[0.25], torch.full((2,), expected, dtype=torch.float64), rtol=0.05, atol=0)
    torch.testing.assert_close(distances[1.0], torch.full((2,), 2**0.5, dtype=torch.float64), rtol=0.02, atol=0)
    assert expert_distances(dense().build()).numel() == 0


def test_distance_is_that_over_all_pairs():
    model = build_model(ModelConfig(**SIZES, num_experts=5, shared_expert_width=8))
    experts = [torch.cat([p[e].flatten() for p in model.blocks[1].moe.experts.parameters()]) for e in range(5)]
    pairs = torch.stack([(a - b).square().sum() for i, a in enumerate(experts) for b in experts[:i]])
    wanted = (pairs.mean() / torch.stack(experts).square().sum(1).mean()).sqrt()
    assert expert_distances(model)[1].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_upcycling_to_sigmoid_gates_preserves_the_function():
    weights = dense()
    target = dataclasses.replace(weights.config, router_gate="sigmoid", router_bias_balancing=True)
    upcycled = upcycle(adapt(weights, target), UpcyclingConfig(num_experts=4))
    assert upcycled.build().blocks[0].moe.gate.sigmoid
    torch.testing.assert_close(predict(upcycled), predict(weights), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"router_gate is softmax, but the weights .* have sigmoid; set it to sigmoid"):
        adapt(upcycled, dataclasses.replace(upcycled.config, router_gate="softmax"))


@pytest.mark.parametrize(("fields", "words"), [
    ({"reinit_share": 1.5}, "it must be at least 0 and at most 1"),
    ({"reinit_share": 0.5, "num_experts": 1, "top_k": 1}, "no other to differ from"),
])  # fmt: skip
def test_redrawing_that_makes_no_sense_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        UpcyclingConfig(**fields)
