"""Imports and exports: every public format filled at random, against independent references and diffusers' own class."""

import dataclasses
import json

import pytest
import torch
from diffusers import DiTTransformer2DModel

from dpt.config.presets import preset_values
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models import build_model, export_weights, import_weights, read_weights
from dpt.models.costs import num_params
from dpt.models.pretrained import _convert, read_config
from dpt.models.weight_maps import infer_public_config, public_map
from dpt.models.weights import expected_shapes
from tests.models import reference

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


def inputs(model, n=2):
    generator = torch.Generator().manual_seed(3)
    size = model.config.input_size
    labels = torch.tensor([1000, 1003]) if model.config.patch_embed_tasks else torch.tensor([7, 10])
    return torch.randn(n, model.in_channels, size, size, generator=generator), torch.tensor([3, 712]), labels


@pytest.mark.parametrize("kind", PUBLIC)
def test_public_weights_compute_what_their_source_computes(tmp_path, kind):
    path, state = public_file(tmp_path, **PUBLIC[kind])
    model = import_weights(path, num_heads=4)
    x, t, y = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y).prediction, reference.dit(state, x, t, y, heads=4), atol=1e-5, rtol=1e-5)


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


def broken(state, how):
    if how == "missing":
        del state["blocks.1.attn.proj.bias"], state["blocks.0.mlp.fc1.bias"]
    elif how == "unknown":
        state["blocks.0.attn.rope"] = torch.zeros(2)
    elif how == "shape":
        state["blocks.1.mlp.fc2.weight"] = torch.zeros(32, 100)
    elif how == "positions":
        state["pos_embed"] = state["pos_embed"] + 0.01
    return state


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("missing", r"missing: blocks\.0\.mlp\.fc1\.bias, blocks\.1\.attn\.proj\.bias"),
        ("unknown", r"unknown: blocks\.0\.attn\.rope"),
        ("shape", r"blocks\.1\.mlp\.fc2\.weight is \[32, 100\]"),
        ("positions", "sin-cos"),
    ],
)
def test_what_does_not_fit_is_listed_and_refused(tmp_path, how, named):
    path, _ = public_file(tmp_path, wrap=lambda s: broken(s, how))
    with pytest.raises(UserError, match=named):
        read_weights(path, num_heads=4)


def test_an_expert_of_another_shape_is_named(tmp_path):
    def wrap(state):
        state["blocks.1.moe.experts.2.up_proj.weight"] = torch.zeros(7, 32)
        return state

    path, _ = public_file(tmp_path, wrap=wrap, **PUBLIC["DiT-MoE"])
    with pytest.raises(UserError, match=r"blocks\.1\.moe\.experts\.2\.up_proj\.weight is \[7, 32\]"):
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


# --- our own exports ---------------------------------------------------------------------------------------------------------


def random_model(seed=0, **fields):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 4, "input_size": 8, "num_classes": 10}
    model = build_model(ModelConfig(**sizes | fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    "fields", [{}, {"num_experts": 4, "shared_expert_width": 16, "router_bias_balancing": True}, {"patch_embed_tasks": 2}]
)
def test_export_and_import_round_trip(tmp_path, fields):
    model = random_model(**fields)
    ema = {name: parameter.detach() * 0.5 for name, parameter in model.named_parameters()}
    sections = {"diffusion": {"beta_schedule": "linear"}, "task": "class", "lineage": {"run_id": "a1"}}
    path = export_weights(model, tmp_path / "export", ema=ema, sections=sections)
    plain, averaged = read_weights(path, ema=False), read_weights(path)
    assert plain.config == averaged.config == model.config
    assert (plain.averaged, averaged.averaged) == (False, True)
    assert averaged.sections == sections
    for name, tensor in model.state_dict().items():
        assert torch.equal(plain.state[name], tensor)
        assert torch.equal(averaged.state[name], ema.get(name, tensor))
    export_weights(averaged, tmp_path / "export")  # replaces it
    again = read_weights(path)
    assert not again.averaged
    assert again.sections == sections
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    path.rename(tmp_path / "weights")
    assert read_weights(tmp_path).config == model.config  # a run's folder, in which its export lies


def test_torn_and_foreign_exports_are_refused(tmp_path):
    model = random_model()
    first, second = (export_weights(model, tmp_path / name) for name in ("first", "second"))
    (first / "config.json").write_bytes((second / "config.json").read_bytes())
    with pytest.raises(UserError, match="different exports"):
        read_weights(first)
    weights = second / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a complete"):
        read_weights(second)
    config = json.loads((second / "config.json").read_text())
    for change, match in (({"format_version": 99}, "format_version"), ({"model": {"wings": 2}}, "wings")):
        (second / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=match):
            read_config(second)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="choose another folder"):
        export_weights(model, tmp_path / "data")


def test_bf16_weights_stay_bf16_on_disk_and_come_back_as_asked(tmp_path):
    model = random_model().bfloat16()
    path = export_weights(model, tmp_path / "export")
    assert read_weights(path, dtype=torch.bfloat16).state["final_layer.linear.bias"].dtype == torch.bfloat16
    assert import_weights(path).final_layer.linear.bias.dtype == torch.float32


# --- diffusers ------------------------------------------------------------------------------------------------------------


def diffusers_model(norm_eps=1e-6):
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, out_channels=8, num_layers=3, sample_size=8, num_embeds_ada_norm=10,
        norm_eps=norm_eps,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model.eval()


@pytest.mark.parametrize("norm_eps", [1e-6, 1e-5, 1e-2])
@pytest.mark.parametrize("safe", [True, False])
def test_diffusers_weights_compute_what_diffusers_computes(tmp_path, norm_eps, safe):
    theirs = diffusers_model(norm_eps)
    theirs.save_pretrained(tmp_path / "pipe" / "transformer", safe_serialization=safe)
    ours = import_weights(tmp_path / "pipe")
    x, t, y = inputs(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, y).prediction, theirs(x, t, y).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("features", ["diffusers", "dit"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"num_conditions": 1, "learn_sigma": False}, {"patch_size": 4, "input_size": 16, "mlp_norm_eps": 1e-2}],
    ids=str,
)
def test_exports_to_diffusers_compute_the_same_there(tmp_path, caplog, features, fields):
    ours = random_model(timestep_features=features, **fields)
    theirs = DiTTransformer2DModel.from_pretrained(export_weights(ours, tmp_path / "out", format="diffusers")).eval()
    assert ("downscale_freq_shift = 0" in caplog.text) == (features == "dit")
    if features == "dit":  # the one difference, which diffusers' config cannot express
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = inputs(ours)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t, y).sample, ours(x, t, y).prediction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("features", ["diffusers", "dit"])
def test_averaged_weights_go_to_diffusers_and_come_back(tmp_path, features):
    ours, averaged = random_model(timestep_features=features), random_model(1).state_dict()
    back = read_weights(export_weights(ours, tmp_path / "out", format="diffusers", ema=averaged))
    assert dataclasses.replace(back.config, preset=ours.config.preset) == ours.config
    assert all(torch.equal(back.state[name], tensor) for name, tensor in averaged.items())


def test_networks_that_diffusers_cannot_hold_are_refused_both_ways(tmp_path):
    with pytest.raises(UserError, match="num_experts"):
        export_weights(random_model(num_experts=4), tmp_path / "out", format="diffusers")
    theirs = diffusers_model()
    torch.nn.init.zeros_(theirs.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias)
    theirs.save_pretrained(tmp_path / "uneven")
    with pytest.raises(UserError, match=r"transformer_blocks\.2.*differs"):
        read_weights(tmp_path / "uneven")


def test_exports_that_name_an_attention_kernel_are_read_everywhere(tmp_path):
    """Older exports stored the kernel that trained them, FlashAttention perhaps, which this machine need not have."""
    path = export_weights(random_model(), tmp_path / "export")
    config = json.loads((path / "config.json").read_text())
    assert "attention_backend" not in config["model"]
    config["model"]["attention_backend"] = "flash2"
    (path / "config.json").write_text(json.dumps(config))
    model = read_weights(path).build()
    x, timesteps, labels = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([1])
    assert model(x, timesteps, labels).prediction.isfinite().all()
