"""Exported pipeline folders: diffusers loads them without dpt, and they predict what dpt does."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from dpt.config.sections import EvaluationConfig
from dpt.data.codec import load_vae
from dpt.embedded import EMBEDDED_VAES
from dpt.errors import UserError
from dpt.evaluation.prediction import Predictor
from dpt.models.pretrained import import_weights, read_weights
from dpt.publishing import pipelines
from dpt.publishing.pipelines import write_pipeline
from tests.publishing.small import export_small, statistics_vae

NETWORKS = {
    "dense": {},
    "dense_mup_qk_norm": {"base_width": 16, "qk_norm": True, "timestep_features": "diffusers", "num_conditions": 1},
    "softmax_shared": {"num_experts": 4, "top_k": 2, "shared_expert_width": 48},
    "sigmoid_biased": {
        "num_experts": 4, "expert_activation": "gelu", "router_gate": "sigmoid", "router_bias_balancing": True,
        "normalize_top_k": True, "capacity_factor": 1.0, "learn_sigma": False,
    },
    "generalist": {"task": "generalist", "patch_embed_tasks": 4, "num_experts": 2},
    "straight": {"diffusion": {"prediction_type": "rectified_flow", "time_convention": "fraction"}},
    "one_step": {"mlp_kernel_size": 3,
                 "diffusion": {"prediction_type": "v_prediction", "timesteps": "last", "initial_noise": "fixed",
                               "vlb_weight": 0.0}},
    "cosine": {"diffusion": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "steps_offset": 1,
                             "timestep_spacing": "leading", "set_alpha_to_one": False}},
    "stretched": {"fits": {"depth": {"fit": "stretch", "resolution": 96}}},
    "other_vae": {"vae": "f16d8", "fits": {"depth": {"fit": "stretch", "resolution": 64}}},
}  # fmt: skip
STEPS, MEMBERS = 3, 2
FILES = Path(pipelines.__file__).with_name("folder")

LOADING = """
import sys
sys.modules["dpt"] = None  # whoever imports it fails
import json, numpy, torch
from pathlib import Path
from PIL import Image
from diffusers import DiffusionPipeline
for folder in sys.argv[2:]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    images = numpy.load(sys.argv[1])
    pictures = [images["wide"], Image.fromarray(images["tall"])]
    out = pipe(pictures, num_inference_steps=3, ensemble_size=2, seed=7, batch_size=2)
    numpy.savez(Path(folder) / "found.npz", *out.depth, *out.uncertainty)
again = pipe(pictures[1], num_inference_steps=1, generator=torch.Generator().manual_seed(0))
assert len(again.depth) == 1 and again.depth[0].shape == images["tall"].shape[:2]
"""


def without_dpt(code: str, cache: Path, *arguments: object) -> None:
    variables = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cache, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def write(folder: Path, out: Path, **options: object) -> Path:
    return write_pipeline(read_weights(folder), out, source=str(folder), **options)


def test_depth_without_dpt_is_dpts_depth(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {"wide": rng.integers(0, 256, (40, 75, 3), np.uint8), "tall": rng.integers(0, 256, (90, 64, 3), np.uint8)}
    np.savez(tmp_path / "images.npz", **images)
    vae = statistics_vae(tmp_path / "f16d8")
    for name, given in NETWORKS.items():
        options = {**given, "vae": str(vae)} if "vae" in given else given
        write(export_small(tmp_path / name, **options), tmp_path / "out" / name)
    folders = [tmp_path / "out" / name for name in NETWORKS]
    without_dpt(LOADING, tmp_path, tmp_path / "images.npz", *folders)
    for name, folder in zip(NETWORKS, folders, strict=True):
        predictor = Predictor(tmp_path / name, config=EvaluationConfig(steps=[STEPS], ensemble=[MEMBERS], seed=7), device="cpu")
        expected = predictor(list(images.values()), task="depth")
        found = list(np.load(folder / "found.npz").values())
        for value, uncertainty, one in zip(found[:2], found[2:], expected, strict=True):
            assert value.std() > 0.01, name
            np.testing.assert_allclose(value, one.value, atol=1e-4, err_msg=name)
            np.testing.assert_allclose(uncertainty, one.uncertainty, atol=1e-4, err_msg=name)


CLASSES = """
import sys
sys.modules["dpt"] = None
import numpy, torch
from pathlib import Path
from diffusers import DiffusionPipeline, DiTPipeline
given = {name: torch.from_numpy(value) for name, value in numpy.load(sys.argv[1]).items()}
latents = given.pop("latents")
for folder in map(Path, sys.argv[2:]):
    found = {}
    for name in ("plain", "exact"):
        more = {"custom_pipeline": "pipeline", "trust_remote_code": True} if name == "exact" else {}
        if more and not (folder / "pipeline.py").is_file():
            continue
        pipe = (DiffusionPipeline if more else DiTPipeline).from_pretrained(folder, **more)
        assert isinstance(pipe, DiTPipeline)
        with torch.no_grad():
            found[name] = pipe.transformer(latents, **given).sample.numpy()
    pipe.set_progress_bar_config(disable=True)
    ids = pipe.get_label_ids(["tench", "shark"])
    assert ids == [0, 1], ids
    images = pipe(class_labels=ids, num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (2, 64, 64, 3), images.shape
    numpy.savez(folder / "found.npz", **found)
"""


@pytest.mark.slow
def test_class_weights_become_a_dit_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    latents, times, labels = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 1000])
    np.savez(tmp_path / "inputs.npz", latents=latents, timestep=times, class_labels=labels)
    (tmp_path / "out").mkdir()
    folders = {}
    for features in ("dit", "diffusers"):
        weights = export_small(tmp_path / features, task="class", timestep_features=features, mlp_norm_eps=1e-5)
        folders[features] = write(weights, tmp_path / "out" / features, class_names=["tench", "shark, great white"])
    without_dpt(CLASSES, tmp_path, tmp_path / "inputs.npz", *folders.values())
    for features, folder in folders.items():
        with torch.no_grad():
            expected = import_weights(tmp_path / features)(latents, times, labels.clamp(max=10)).prediction.numpy()
        found = np.load(folder / "found.npz")
        assert set(found) == ({"plain", "exact"} if features == "dit" else {"plain"})
        np.testing.assert_allclose(found["exact" if features == "dit" else "plain"], expected, atol=1e-5)
        assert (np.abs(found["plain"] - expected).max() > 1e-4) == (features == "dit")
        index = json.loads((folder / "model_index.json").read_text())
        assert index["id2label"] == {"0": "tench", "1": "shark, great white", **{str(n): str(n) for n in range(2, 10)}}


@pytest.mark.parametrize("convolutions", [True, False])
def test_statistics_of_a_vae_become_part_of_what_dit_pipeline_decodes(tmp_path: Path, convolutions: bool) -> None:
    made = statistics_vae(tmp_path / "vae", use_quant_conv=convolutions, use_post_quant_conv=convolutions)
    weights = export_small(tmp_path / "weights", task="class", vae=str(made))
    vae = AutoencoderKL.from_pretrained(write(weights, tmp_path / "out") / "vae")
    codec = load_vae(str(made))
    torch.manual_seed(0)
    latents, images = torch.randn(2, 8, 4, 4), torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample  # as DiTPipeline does
        posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(decoded, codec.decode_with_gradients(latents), atol=1e-5, rtol=1e-4)
    moments = codec.encode(images)
    torch.testing.assert_close(posterior.mean * 0.5, codec.scaling.normalize(moments[:, 0]), atol=1e-5, rtol=1e-4)
    spread = (0.5 * moments[:, 1]).exp() * codec.scaling.scale
    torch.testing.assert_close(posterior.std * 0.5, spread, atol=1e-5, rtol=1e-4)
    assert vae.config.latents_mean is None


def test_the_copied_files_need_torch_diffusers_and_numpy_only() -> None:
    allowed = {"torch", "diffusers", "numpy", "PIL"} | sys.stdlib_module_names
    for file in FILES.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, file.name


def test_a_folder_names_no_place_of_this_machine_and_is_replaced_whole(tmp_path: Path) -> None:
    folder = export_small(tmp_path / "weights")
    out = write(folder, tmp_path / "out", card="words\n", steps=20, ensemble=5)
    texts = {p.name: p.read_text() for p in out.rglob("*") if p.suffix in (".json", ".md", ".py")}
    for place in (tmp_path, Path(pipelines.__file__).parents[2]):
        assert not [name for name, text in texts.items() if str(place) in text]
    assert json.loads(texts["model_index.json"])["default_steps"] == 20
    assert json.loads(texts["model_index.json"])["default_ensemble_size"] == 5
    assert texts["README.md"] == "words\n"
    write(folder, out)
    assert not (out / "README.md").exists()
    assert [p.name for p in tmp_path.iterdir()].count("out") == 1
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "flow"}, "trained for flow; pipelines are for class images and depth only"),
        ({"task": "class", "num_experts": 2}, "DiTPipeline has no experts"),
        ({"task": "class", "diffusion": {"prediction_type": "rectified_flow"}}, "does not sample rectified_flow"),
        ({"task": "class", "num_classes": 1200}, "1200 classes; diffusers' DiTPipeline has 1000 at most"),
    ],
)
def test_what_has_no_pipeline_is_refused(tmp_path: Path, options: dict, words: str) -> None:
    folder = export_small(tmp_path / "weights", **options)
    with pytest.raises(UserError, match=words):
        write(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    folder = export_small(tmp_path / "weights")
    with pytest.raises(UserError, match="exists and holds no pipeline"):
        write(folder, folder)


@pytest.mark.parametrize("name", ["dense_mup_qk_norm", "sigmoid_biased", "one_step"])
def test_dpt_reads_its_own_pipelines(tmp_path: Path, name: str) -> None:
    folder = export_small(tmp_path / "weights", **NETWORKS[name])
    out = write(folder, tmp_path / "out")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    config = EvaluationConfig(steps=[2])
    ours, theirs = (Predictor(place, config=config, device="cpu")([image])[0].value for place in (folder, out))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert read_weights(out).sections["lineage"] == read_weights(folder).sections["lineage"]


def test_a_vae_of_this_machine_travels_with_the_pipeline(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED_VAES["embedded"], tmp_path / "my_vae")
    out = write(export_small(tmp_path / "weights"), tmp_path / "out", vae=str(tmp_path / "my_vae"))
    assert str(tmp_path) not in (out / "transformer" / "config.json").read_text()
    moved = out.rename(tmp_path / "moved")
    assert read_weights(moved).sections["vae"]["name"] == str(moved / "vae")
    assert Predictor(moved, device="cpu").codec.sha256 == load_vae().sha256
