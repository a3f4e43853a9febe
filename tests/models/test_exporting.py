"""Our exports and diffusers' folders, written and read: nothing changes on the way; torn and foreign ones are refused."""

import dataclasses
import json

import pytest
import torch
from diffusers import DiTTransformer2DModel

from dpt.errors import UserError
from dpt.models import export_weights, import_weights, read_weights
from dpt.models.pretrained import read_config
from tests.models.networks import batch, random_model


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


def test_exports_that_name_an_attention_kernel_are_read_everywhere(tmp_path):
    """Older exports stored the kernel that trained them, FlashAttention perhaps, which this machine need not have."""
    path = export_weights(random_model(), tmp_path / "export")
    config = json.loads((path / "config.json").read_text())
    assert "attention_backend" not in config["model"]
    config["model"]["attention_backend"] = "flash2"
    (path / "config.json").write_text(json.dumps(config))
    model = read_weights(path).build()
    assert model(*batch(model)).prediction.isfinite().all()


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


def assert_equal(ours, theirs):
    with torch.no_grad():
        expected = theirs(*batch(ours)).sample
        torch.testing.assert_close(ours(*batch(ours)).prediction, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_eps", [1e-6, 1e-5, 1e-2])
@pytest.mark.parametrize("safe", [True, False])
def test_diffusers_weights_compute_what_diffusers_computes(tmp_path, norm_eps, safe):
    theirs = diffusers_model(norm_eps)
    theirs.save_pretrained(tmp_path / "pipe" / "transformer", safe_serialization=safe)
    ours = import_weights(tmp_path / "pipe")
    assert_equal(ours, theirs)


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
    assert_equal(ours, theirs)


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
