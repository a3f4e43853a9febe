"""Public weights: every format filled at random, against independent references; what does not fit is refused."""

import dataclasses

import pytest
import torch

from dpt.config.presets import preset_values
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models import import_weights, read_weights
from dpt.models.costs import num_params
from dpt.models.pretrained import _convert
from dpt.models.weight_maps import infer_public_config, public_map
from dpt.models.weights import expected_shapes
from tests.models import reference
from tests.models.networks import batch

PUBLIC = {
    "DiT 256": {"size": 8},
    "DiT 512": {"size": 16, "patch": 4},
    "DiT without sigma": {"out": 4},
    "DiT-MoE": {"experts": 4, "shared": True},
    "DiT-MoE flash": {"experts": 4, "shared": True, "flash": True},
    "upcycled": {"experts": 4, "kind": "gelu"},
    "perception": {"channels": 8},
    "generalist": {"experts": 4, "kind": "gelu", "channels": 12, "tasks": 4, "classes": 1004},
}
SMALL = {"hidden": 32, "depth": 2}


def public_file(tmp_path, wrap=None, **changes):
    state = reference.random_state(reference.shapes(**SMALL | changes))
    path = tmp_path / "weights.pt"
    torch.save(wrap(state) if wrap else state, path)
    return path, state


@pytest.mark.parametrize("kind", PUBLIC)
def test_public_weights_compute_what_their_source_computes(tmp_path, kind):
    path, state = public_file(tmp_path, **PUBLIC[kind])
    model = import_weights(path, num_heads=4)
    with torch.no_grad():
        ours, (expected, _) = model(*batch(model)).prediction, reference.network(state, **SMALL | PUBLIC[kind])(*batch(model))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_the_architecture_is_told_by_keys_and_shapes(tmp_path):
    weights = read_weights(public_file(tmp_path, **PUBLIC["generalist"])[0], num_heads=4)
    config = weights.config
    assert (weights.sections["flow_code"], weights.sections["depth_prompt"]) == ("linear_75", "ground_truth")
    assert (config.num_experts, config.top_k, config.normalize_top_k, config.expert_activation) == (4, 2, False, "gelu")
    assert (config.num_conditions, config.patch_embed_tasks, config.num_classes, config.input_size) == (2, 4, 1004, 8)
    assert weights.source == "public generalist"
    assert weights.sections["diffusion"]["beta_schedule"] == "squaredcos_cap_v2"
    assert read_weights(public_file(tmp_path, **PUBLIC["DiT-MoE flash"])[0]).config.num_heads == 4  # from the query norm
    with pytest.raises(UserError, match="give num_heads"):
        read_weights(public_file(tmp_path)[0])
    for experts, preset in ((0, "S/2"), (8, "S/2-8E2A"), (4, "custom")):
        shapes = reference.shapes(hidden=384, depth=12, experts=experts, shared=True)
        config = infer_public_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        assert (config.num_heads, config.preset) == (6, preset)


XL = {"hidden": 1152, "depth": 28, "classes": 1000, "size": 32}
PUBLISHED = {  # key and shape lists at full size -> the preset, and what differs from it
    "DiT-XL/2 256": (XL, "XL/2", {}),
    "DiT-XL/2 512": (XL | {"size": 64}, "XL/2", {"input_size": 64}),
    "DiT-MoE-S/2-8E2A": (XL | {"hidden": 384, "depth": 12, "experts": 8, "shared": True}, "S/2-8E2A", {}),
    "DiT-MoE-XL/2-8E2A flash": (
        XL | {"experts": 8, "shared": True, "flash": True, "heads": 16},
        "XL/2-8E2A",
        {"qk_norm": True},
    ),
    "DiT-MoE-G/2-16E2A": (XL | {"hidden": 1408, "depth": 40, "experts": 16, "shared": True}, "G/2-16E2A", {}),
    "generalist": (
        XL | {"experts": 8, "kind": "gelu", "channels": 12, "tasks": 4, "classes": 1004, "size": 64},
        "XL/2",
        {"num_experts": 8, "num_conditions": 2, "patch_embed_tasks": 4, "num_classes": 1004, "input_size": 64,
         "normalize_top_k": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_are_the_presets(name):
    """Every tensor of the lists has its place, and none is left over; on the meta device."""
    arguments, preset, fields = PUBLISHED[name]
    state = {key: torch.empty(shape, device="meta") for key, shape in reference.shapes(**arguments).items()}
    config = infer_public_config(state)
    expected = ModelConfig(**preset_values(preset) | fields)
    unused = {} if config.num_experts else {"expert_activation": "swiglu", "normalize_top_k": False}
    assert config == dataclasses.replace(expected, **unused)
    assert sum(tensor.numel() for tensor in state.values()) == num_params(config).total
    del state["pos_embed"]
    converted = _convert(state, config, public_map(arguments.get("flash", False)), name)
    assert {key: tensor.shape for key, tensor in converted.items()} == expected_shapes(config)


@pytest.mark.parametrize("ema", [True, False])
def test_training_checkpoints_hold_averages_and_plain_weights(tmp_path, ema):
    import argparse

    def wrap(state):
        plain = {f"module.{n}": t + (n != "pos_embed") for n, t in state.items()}
        return {"model": plain, "ema": state, "opt": {"step": 3}, "args": argparse.Namespace(lr=1e-4)}

    path, state = public_file(tmp_path, wrap=wrap)
    weights = read_weights(path, ema=ema, num_heads=4)
    assert weights.averaged == ema
    assert torch.equal(weights.state["x_embedder.proj.bias"], state["x_embedder.proj.bias"] + (not ema))


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        (
            "DiT 256",
            {"blocks.1.attn.proj.bias": None, "blocks.0.mlp.fc1.bias": None},
            r"missing: blocks\.0\.mlp\.fc1\.bias, blocks\.1\.attn\.proj\.bias",
        ),
        ("DiT 256", {"blocks.0.attn.rope": torch.zeros(2)}, r"unknown: blocks\.0\.attn\.rope"),
        ("DiT 256", {"blocks.1.mlp.fc2.weight": torch.zeros(32, 100)}, r"blocks\.1\.mlp\.fc2\.weight is \[32, 100\]"),
        ("DiT 256", {"pos_embed": reference.position_table(4, 32) + 0.01}, "sin-cos"),
        (
            "DiT-MoE",
            {"blocks.1.moe.experts.2.up_proj.weight": torch.zeros(7, 32)},
            r"blocks\.1\.moe\.experts\.2\.up_proj\.weight is \[7, 32\]",
        ),
    ],
)
def test_what_does_not_fit_is_listed_and_refused(tmp_path, kind, changes, named):
    def wrap(state):
        return {name: tensor for name, tensor in (state | changes).items() if tensor is not None}

    path, _ = public_file(tmp_path, wrap=wrap, **PUBLIC[kind])
    with pytest.raises(UserError, match=named):
        read_weights(path, num_heads=4)


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_files_that_are_no_weights_are_refused(tmp_path, capsys):
    torch.save({"x_embedder.proj.weight": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "other.pt")
    for name in ("evil.pt", "text.pt", "list.pt", "other.pt", "absent.pt", "absent"):
        with pytest.raises(UserError, match=name):
            read_weights(tmp_path / name)
    assert "unpickled" not in capsys.readouterr().out
