"""The network: sizes, function, conditioning, positions, checkpointing, compilation."""

import math

import numpy as np
import pytest
import torch

from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models import build_model
from dpt.models.adapting import adapt
from dpt.models.layers import PatchEmbedRouter, TimestepEmbedder, modulated_norm, position_table
from dpt.models.weights import Weights
from tests.models.networks import SIZES, VARIANTS, batch, gradients, random_model


@pytest.mark.parametrize("variant", VARIANTS)
def test_train_and_eval_compute_one_function_and_every_parameter_gets_a_gradient(variant):
    model = random_model(**VARIANTS[variant])
    out, grads = gradients(model.train(), batch(model))
    assert [name for name, grad in grads.items() if grad is None] == []
    with torch.no_grad():
        assert torch.equal(model.eval()(*batch(model)).prediction, out.prediction)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (16, 2)])
def test_any_patch_divisible_size(variant, size):
    model = random_model(**VARIANTS[variant])
    assert model(*batch(model, size)).prediction.shape == (4, 8, *size)


def test_sizes_and_channels_that_do_not_fit_are_refused():
    model = random_model()
    latents, timesteps, labels = batch(model, (8, 7))
    with pytest.raises(UserError, match="multiples of 2"):
        model(latents, timesteps, labels)
    with pytest.raises(UserError, match="takes 4"):
        model(torch.zeros(4, 8, 8, 8), timesteps, labels)


def test_unknown_presets_and_fields_are_refused():
    with pytest.raises(UserError, match="no preset"):
        build_model("XXL/2")
    with pytest.raises(UserError, match="experts"):
        build_model("S/2", experts=8)


def test_a_new_network_predicts_zero_and_its_blocks_are_the_identity():
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SIZES))
    latents, timesteps, labels = batch(model)
    assert not model(latents, timesteps, labels).prediction.any()
    x, conditioning = torch.randn(4, 16, 32), torch.randn(4, 32)
    assert torch.equal(model.blocks[0](x, conditioning)[0], x)


def test_position_table_against_its_formula():
    table = position_table(3, 5, 16).numpy()
    omega = 10000.0 ** -(np.arange(4) / 4)
    for row in range(3):
        for column in range(5):
            expected = np.concatenate([f(p * omega) for p in (column, row) for f in (np.sin, np.cos)])
            np.testing.assert_allclose(table[row * 5 + column], expected, atol=1e-7)


@pytest.mark.parametrize("rows", [3, 1])
def test_a_modulated_norm_and_its_gradients_are_the_formula(rows):
    torch.manual_seed(0)
    sizes = [(3, 5, 8), (rows, 8), (rows, 8)]
    x, shift, scale = inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt()
    formula, ours = normed * (1 + scale[:, None]) + shift[:, None], modulated_norm(x, shift, scale, 1e-3)
    torch.testing.assert_close(ours, formula)
    weights = torch.randn(3, 5, 8, dtype=torch.float64)
    found, expected = (torch.autograd.grad((result * weights).sum(), inputs) for result in (ours, formula))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("preset", "tasks"), [("S/2", 0), ("S/2-8E2A", 0), ("S/2", 1000)])
def test_a_shared_conditioning_is_given_once(preset, tasks):
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "num_heads": 2, "depth": 2, "mlp_ratio": 2.0, "input_size": 8, "patch_embed_tasks": tasks}
    model = build_model(preset, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        noisy = torch.randn(3, 4, 8, 8)
        each = model(noisy, torch.full((3,), 7), torch.full((3,), 2)).prediction
        shared = model(noisy, torch.tensor([7]), torch.tensor([2])).prediction
    torch.testing.assert_close(shared, each, rtol=1e-5, atol=1e-5)


def test_patch_embed_router_is_one_convolution_a_task():
    torch.manual_seed(0)
    router = PatchEmbedRouter(3, 2, 5, 8)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x, tasks = torch.randn(4, 5, 6, 4), torch.tensor([2, 0, 2, 0])
    out = router(x, tasks)
    for i, task in enumerate(tasks):
        conv = torch.nn.functional.conv2d(x[i : i + 1], router.weight[task], router.bias[task], stride=2)
        torch.testing.assert_close(out[i], conv[0].flatten(1).T, atol=1e-5, rtol=1e-5)
    out.sum().backward()
    assert router.weight.grad is not None
    assert not router.weight.grad[1].any()
    assert router.weight.grad[0].any()


def test_task_labels_choose_the_convolution_when_labels_are_dropped():
    model = random_model(**VARIANTS["router"])
    latents, timesteps, labels = batch(model)
    dropped = torch.full_like(labels, 10)
    a = model(latents, timesteps, dropped, task_labels=labels).prediction
    b = model(latents, timesteps, dropped, task_labels=labels.flip(0)).prediction
    assert not torch.allclose(a, b)
    with pytest.raises(IndexError):
        model(latents, timesteps, dropped)


def test_clip_projection_starts_at_zero_and_no_embedding_is_a_zero_embedding():
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SIZES, clip_embedding_size=6))
    assert not model.clip_embedder.weight.any()
    model = random_model(clip_embedding_size=6)
    latents, timesteps, labels = batch(model)
    none = model(latents, timesteps, labels).prediction
    assert torch.equal(model(latents, timesteps, labels, torch.zeros(4, 6)).prediction, none)
    assert not torch.allclose(model(latents, timesteps, labels, torch.ones(4, 6)).prediction, none)


@pytest.mark.parametrize("variant", ["dense", "swiglu"])
def test_activation_checkpointing_changes_nothing(variant):
    model = random_model(**VARIANTS[variant])
    _, plain = gradients(model, batch(model))
    model.set_activation_checkpointing(True)
    _, recomputed = gradients(model, batch(model))
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_and_autocast_follow_fp32(variant):
    model = random_model(**VARIANTS[variant])
    exact = model(*batch(model))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*batch(model))
    half = model.bfloat16()(*batch(model))
    for out in (mixed, half):
        assert out.prediction.dtype == torch.float32
        assert out.load_balancing_loss.dtype == torch.float32
        torch.testing.assert_close(out.load_balancing_loss, exact.load_balancing_loss, atol=0.3, rtol=0.1)
        assert (out.prediction - exact.prediction).norm() < 0.1 * exact.prediction.norm()


@pytest.mark.parametrize("kind", ["dit", "diffusers"])
def test_timestep_features_are_those_of_the_public_networks(kind):
    """To the last bits at large timesteps too, where a frequency's rounding is 6e-5 of an angle."""
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = torch.cat([torch.arange(1000).float(), torch.tensor([0.5, 0.001, 1.0, 998.7])])
    seen = []
    embedder = TimestepEmbedder(16, kind)
    embedder.mlp = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity())
    embedder.mlp[0].register_forward_hook(lambda module, given, out: seen.append(given[0]))
    embedder.mlp[0].weight = torch.nn.Parameter(torch.zeros(1))
    embedder(timesteps)
    if kind == "diffusers":
        expected = get_timestep_embedding(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=1)
    else:
        angles = timesteps[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)[None]
        expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert (seen[0] - expected).abs().max() < 6e-7


def test_convolutions_in_the_mlps_start_as_the_identity_and_let_neighbours_see_each_other():
    plain, wide = random_model(num_conditions=1), random_model(num_conditions=1, mlp_kernel_size=3)
    weights = Weights(config=plain.config, state=plain.state_dict(), source="plain")
    adapted = adapt(weights, wide.config)
    wide.load_state_dict(adapted.state)
    inputs = batch(wide, (4, 12))
    torch.testing.assert_close(wide(*inputs).prediction, plain(*inputs).prediction)
    untouched = build_model(wide.config).state_dict()
    names = [name for name in untouched if name.endswith("mlp.conv.weight")]
    assert len(names) == wide.config.depth
    assert all(torch.equal(untouched[name], adapted.state[name]) for name in names)
    block = wide.blocks[0]
    torch.nn.init.normal_(block.mlp.conv.weight)
    x = torch.zeros(1, 4 * 6, 32, requires_grad=True)
    seen = torch.autograd.grad(block.mlp(x, (4, 6))[0, 8].sum(), x)[0][0].abs().sum(-1) > 0  # row 1, column 2
    assert seen.nonzero().flatten().tolist() == [1, 2, 3, 7, 8, 9, 13, 14, 15]
    with pytest.raises(UserError, match="mlp_kernel_size is 0, but the weights"):
        adapt(adapted, plain.config)
