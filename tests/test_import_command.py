"""`dpt import` and bad weights from the command line: one sentence each, and exit code 2."""

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from dpt.cli import main
from dpt.models import read_weights
from dpt.models.exporting import export_weights
from dpt.models.pretrained import read_config
from tests.models import reference
from tests.models.networks import random_model
from tests.models.test_exporting import diffusers_model
from tests.models.test_pretrained import Evil, public_file


def imported(file, out, *options):
    main(["import", str(file), str(out), "--heads", "4", *map(str, options)])
    return read_config(out)["diffusion"]


def test_an_option_changes_what_it_names_and_nothing_else(tmp_path):
    file, _ = public_file(tmp_path, experts=4, kind="gelu", channels=12, tasks=4, classes=1004)
    before = imported(file, tmp_path / "plain")
    assert before["beta_schedule"] == "squaredcos_cap_v2"
    after = imported(file, tmp_path / "v", "--objective", "v_prediction")
    assert after == before | {"prediction_type": "v_prediction"}
    options = ("--schedule", "scaled_linear", "--steps-offset", "1", "--no-set-alpha-to-one", "--beta-end", "0.013")
    options += ("--zero-terminal-snr", "--objective", "sample", "--timestep-spacing", "leading")
    assert imported(file, tmp_path / "all", *options) == before | {
        "beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.013, "steps_offset": 1, "set_alpha_to_one": False,
        "rescale_betas_zero_snr": True, "prediction_type": "sample", "timestep_spacing": "leading",
    }  # fmt: skip


def test_a_scheduler_folder_says_all_and_options_are_over_it(tmp_path):
    file, _ = public_file(tmp_path, experts=4, kind="gelu", channels=12, tasks=4, classes=1004)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
                              set_alpha_to_one=False, clip_sample=False, prediction_type="v_prediction")  # fmt: skip
    scheduler.save_pretrained(tmp_path / "scheduler")
    found = imported(file, tmp_path / "out", "--scheduler", tmp_path / "scheduler", "--objective", "epsilon")
    assert (found["beta_schedule"], found["beta_end"], found["steps_offset"]) == ("scaled_linear", 0.012, 1)
    assert (found["prediction_type"], found["timestep_spacing"], found["set_alpha_to_one"]) == ("epsilon", "leading", False)


def test_a_pipeline_brings_its_scheduler(tmp_path):
    diffusers_model().save_pretrained(tmp_path / "pipe" / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "pipe" / "scheduler")
    assert imported(tmp_path / "pipe", tmp_path / "out")["timestep_spacing"] == "leading"


def test_the_time_convention_is_the_familys(tmp_path, refused):
    file, _ = public_file(tmp_path, experts=4, shared=True)
    assert imported(file, tmp_path / "flow", "--objective", "rectified_flow")["time_convention"] == "fraction"
    assert imported(file, tmp_path / "noise", "--objective", "epsilon")["time_convention"] == "index"
    options = ("--objective", "rectified_flow", "--time-convention", "index")
    assert imported(file, tmp_path / "index", *options)["time_convention"] == "index"
    assert "--objective" in refused(main, "import", file, tmp_path / "none", "--heads", "4", "--steps-offset", "1")


def test_parts_and_variants_of_diffusers_folders(tmp_path, refused):
    theirs = diffusers_model()
    expected = read_weights(_saved(theirs, tmp_path / "whole")).state
    for name, options in {
        "parts": {"max_shard_size": "20KB"},
        "parts of pickles": {"max_shard_size": "20KB", "safe_serialization": False},
        "variant": {"variant": "fp16"},
        "parts of a variant": {"variant": "fp16", "max_shard_size": "20KB"},
    }.items():
        folder = _saved(theirs, tmp_path / name, **options)
        assert len(list(folder.iterdir())) > (2 if "parts" in name else 1)
        state = read_weights(folder, variant=options.get("variant", "")).state
        assert all(torch.equal(state[n], t) for n, t in expected.items())
        assert read_weights(folder).state.keys() == expected.keys()  # the only variant needs no name
    for parameter in theirs.parameters():
        torch.nn.init.zeros_(parameter)
    both = _saved(theirs, tmp_path / "variant")
    assert read_weights(both).state["final_layer.linear.bias"].abs().sum() == 0
    assert read_weights(both, variant="fp16").state["final_layer.linear.bias"].abs().sum() > 0
    for arguments, words in (
        ((both, "--variant", "ema"), "there: fp16, plain"),
        ((tmp_path / "x.pt", "--variant", "a"), "variant"),
    ):
        assert words in refused(main, "import", arguments[0], tmp_path / "out", *arguments[1:])
    next((tmp_path / "parts").glob("*-00002-*")).unlink()
    refused(main, "import", tmp_path / "parts", tmp_path / "out")


def _saved(model: DiTTransformer2DModel, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def _public(change):
    def make(folder):
        state = reference.random_state(reference.shapes(hidden=32, depth=2, out=8))
        change(state)
        torch.save(state, folder / "weights.pt")
        return folder / "weights.pt"

    return make


def _exported(change):
    def make(folder):
        path = export_weights(random_model(), folder / "export")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(change(config)))
        return path

    return make


def _diffusers(change):
    def make(folder):
        path = _saved(diffusers_model(), folder / "theirs")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | change))
        return path

    return make


def _put(name, value):
    return lambda state: state.__setitem__(name, value)


def _drop(part):
    return lambda state: [state.pop(name) for name in list(state) if part in name]


BAD = {
    "rank of positions": (_public(_put("pos_embed", torch.zeros(16))), "pos_embed is of shape [16]"),
    "rank of the embedding": (_public(_put("x_embedder.proj.weight", torch.zeros(32, 16))), "x_embedder.proj is of shape"),
    "rank of a scalar": (_public(_put("blocks.0.mlp.fc1.weight", torch.tensor(1.0))), "blocks.0.mlp.fc1.weight is of shape []"),
    "empty": (_public(_put("y_embedder.embedding_table.weight", torch.zeros(0, 32))), "none of them 0"),
    "rank inside": (_public(_put("blocks.1.attn.qkv.bias", torch.zeros(3, 32))), "blocks.1.attn.qkv.bias is [3, 32]"),
    "NaN": (_public(_put("final_layer.linear.bias", torch.full((32,), math.nan))), "values in final_layer.linear.bias"),
    "infinite": (_public(lambda s: s["blocks.0.attn.proj.bias"].fill_(-math.inf)), "values in blocks.0.attn.proj.bias"),
    "whole numbers": (_public(_put("final_layer.linear.bias", torch.zeros(32).long())), "final_layer.linear.bias of int64"),
    "no blocks": (_public(_drop("blocks.")), "have no blocks"),
    "many missing": (_public(_drop("attn")), "more"),
    "object": (_public(_put("args", Evil())), "holds a Python object"),
    "type in config": (_exported(lambda c: c | {"model": c["model"] | {"hidden_size": "wide"}}), "model.hidden_size is 'wide'"),
    "list in config": (_exported(lambda c: c | {"model": [1]}), "model is [1]"),
    "unknown field": (_exported(lambda c: c | {"model": c["model"] | {"hidden_sise": 3}}), 'did you mean "hidden_size"'),
    "unknown section": (_exported(lambda c: c | {"wings": 3}), "does not know wings"),
    "type of a section": (_exported(lambda c: c | {"diffusion": 3}), "diffusion is 3"),
    "no object": (_exported(lambda c: 5), "is a JSON object, not a int"),
    "diffusers type": (_diffusers({"num_attention_heads": "4"}), "num_attention_heads is '4'"),
    "diffusers unknown": (_diffusers({"wings": 3}), 'no field "wings"'),
    "diffusers part": (_diffusers({"cross_attention_dim": 8}), "cross_attention_dim is 8"),
    "empty folder": (lambda folder: folder, "neither an export nor a diffusers folder"),
}


def test_names_that_are_none_are_left_out(tmp_path):
    for name, change in {"plain": lambda state: None, "odd": _put(7, torch.zeros(2))}.items():
        imported(_public(change)(tmp_path), tmp_path / name, "--objective", "epsilon")
    plain, odd = (read_weights(tmp_path / name).state for name in ("plain", "odd"))
    assert odd.keys() == plain.keys()


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_cost_one_sentence(tmp_path, refused, name):
    make, words = BAD[name]
    path = make(tmp_path)
    error = refused(main, "import", path, tmp_path / "out", "--heads", "4")
    assert words in error
    assert str(path) in error
    assert len(error) < 900
    for noise in ("weights_only", r"\d", "safe_globals", "unpickled\n"):
        assert noise not in error
