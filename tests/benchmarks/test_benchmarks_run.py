"""Every benchmark runs, at sizes that take seconds, and writes the fields that it promises. Nothing is said about time."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import NAMES
from benchmarks.gpu import __main__ as acceptance
from benchmarks.gpu import parity, pipeline, training
from benchmarks.gpu.training import gaps
from benchmarks.profile import kind_of
from dpt.scaling.processes import start_forked
from tests.gloo import run_script

ROOT = Path(__file__).resolve().parents[2]
TIMED = {"case", "what", "median_s", "low_s", "high_s", "rounds"}

TINY = {
    "moe_layer": ["--precisions", "fp32", "--tokens", "64", "--hidden-size", "32", "--experts", "4", "--rounds", "1"],
    "optimizer_ema": ["--preset", "a1", "--rounds", "1"],
    "train_step": [
        "--cases", "a1:1", "S/2-8E2A:1", "--precisions", "fp32", "--batch", "1", "--input-size", "4", "--rounds", "1"
    ],
    "sample": [
        "--preset", "a1", "--depth", "1", "--resolution", "32", "--images", "1", "--steps", "2", "--ensemble", "2",
        "--aligned", "3", "--rounds", "1",
    ],
    "checkpoint": ["--preset", "a1", "--depth", "1", "--rounds", "1"],
    "scaling": [
        "--ranks", "1", "2", "--batch", "1", "--depth", "1", "--hidden-size", "64", "--input-size", "16", "--rounds", "1"
    ],
    "loader": ["--megabytes", "1", "--rounds", "1"],
    "encode": ["--resolution", "32", "--images", "8", "--batch-size", "4"],
    "profile": ["--cases", "a1:1", "--precision", "fp32", "--batch", "1", "--input-size", "4", "--kernels", "3"],
}  # fmt: skip
WHAT = {
    "moe_layer": {"bound", "ours", "boolean masks", "deepspeed"},
    "optimizer_ema": {"bound", "ours", "loop over parameters"},
    "train_step": {"bound", "ours", "ours, ZeRO 1", "textbook", "diffusers"},
    "sample": {"bound", "ours", "one at a time", "encoding", "decoding", "merging", "merging by BFGS", "BFGS"},
    "checkpoint": {"bound", "ours", "torch.save", "torch.load", "deepspeed"},
    "scaling": {"bound", "ours"},
}
SLOW = ("train_step", "sample", "scaling", "checkpoint")
"""Left to make test-all; the acceptance of a GPU in its toy form, below, trains and samples too."""

RUNNER = """
import importlib, json, sys
if __name__ == "__main__":
    for name, arguments in json.loads(sys.argv[1]).items():
        importlib.import_module(f"benchmarks.{name}").main(arguments)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What a benchmark wrote, by name: the slow ones and the others, each group from one forked process."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("benchmarks")
            group = [one for one in TINY if (one in SLOW) == (name in SLOW)]
            arguments = {one: [*TINY[one], "--json", str(folder / f"{one}.json")] for one in group}
            script, log = folder / "run_all.py", folder / "log.txt"
            script.write_text(RUNNER)
            words = [sys.executable, str(script), json.dumps(arguments)]
            process = start_forked(words, log, {**os.environ, "PYTHONPATH": str(ROOT)})
            process.wait()
            assert process.exit_code() == 0, log.read_text()[-6000:]
            made.update({one: json.loads((folder / f"{one}.json").read_text()) for one in group})
        return made[name]

    return of


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in WHAT])
def test_it_measures_what_it_says(name, written):
    assert written(name)["benchmark"] == name
    assert written(name)["machine"]["torch"]
    results = written(name)["results"]
    assert {row["what"] for row in results} == WHAT[name]
    for row in results:
        assert set(row) >= TIMED
        assert 0 <= row["low_s"] <= row["median_s"] <= row["high_s"]
        if row["what"] != "bound" and any(r["what"] == "bound" and r["case"] == row["case"] for r in results):
            assert row["share_of_bound"] > 0
        if row["what"] not in ("ours", "bound") and row["case"] != "parts":
            assert row["times_ours"] > 0
    if name in ("train_step", "moe_layer"):
        assert all(row["peak_bytes"] > 0 for row in results if row["what"] != "bound")
    if name == "moe_layer":
        assert sum("hot_over_balanced" in row for row in results) == 3
    if name == "sample":
        assert results[0]["abs_rel_apart"] < 1e-3
    if name == "scaling":
        for row in results:
            if row["what"] == "ours" and ", 2 ranks" in row["case"]:
                figures = {key: value for key, value in row.items() if key.endswith("_over_model")}
                assert figures
                assert all(value == pytest.approx(1.0, rel=0.05) for value in figures.values()), row
                assert row["predicted_s"] > 0


def test_the_profile_adds_up(written):
    results = written("profile")["results"]
    kinds = [row for row in results if not row["case"].endswith("kernels")]
    assert sum(row["share"] for row in kinds) == pytest.approx(1.0, abs=0.01)
    assert {"matrix products", "attention", "optimizer"} <= {row["what"] for row in kinds}
    assert sum(row["case"].endswith("kernels") for row in results) == 3


@pytest.mark.parametrize(("kernel", "kind"), [  # as an H200 shows them
    ("nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NNN", "matrix products"),
    ("cutlass::device_kernel<enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal>>", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1_cga1x1x1_kernel0_0", "attention"),
    ("void cudnn::fusion::compute_dot_do_o<true>(void const*, void const*, void*)", "attention"),
    ("triton_red_fused_add_addcmul_native_layer_norm_split_unsqueeze_1", "compiled passes"),
    ("void at::native::multi_tensor_apply_kernel<at::native::FusedOptimizerTensorListMetadata<4>>", "optimizer"),
    ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::Tensor)>", "copies and zeros"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
])  # fmt: skip
def test_kernels_of_a_gpu_are_sorted_by_kind(kernel, kind):
    assert kind_of(kernel) == kind


def test_gaps_are_when_no_kernel_runs():
    def kernel(start, end, name="k", device=torch.autograd.DeviceType.CUDA):
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))

    events = [kernel(0, 10), kernel(5, 12), kernel(20, 30), kernel(0, 40, "Optimizer.step#AdamWEMA.step")]
    events.append(kernel(0, 90, device=torch.autograd.DeviceType.CPU))
    assert gaps(SimpleNamespace(events=lambda: events)) == pytest.approx(8e-6)


def test_shards_are_read_and_written_at_a_share_of_a_bound(written):
    for name in ("loader", "encode"):
        (ours,) = (row for row in written(name)["results"] if row["what"] == "ours")
        assert ours["share_of_bound"] > 0
    waits = [row["data_wait"] for row in written("loader")["results"] if "data_wait" in row]
    assert len(waits) == 2
    assert all(0 <= wait <= 1 for wait in waits)


@pytest.mark.slow
def test_startup_finds_the_first_step(tmp_path):
    from benchmarks import startup

    recipe = startup.write_recipe(tmp_path, "a1", 1)
    fields = json.loads(recipe.read_text())
    fields["dpt"]["model"] |= {"hidden_size": 32, "depth": 1, "num_heads": 2}
    recipe.write_text(json.dumps(fields))
    startup.first_step(tmp_path, recipe)()
    startup.command("-m", "dpt.cli", "--help")()
    with pytest.raises(subprocess.CalledProcessError):
        startup.command("-m", "dpt.cli", "nothing")()
    recipe.write_text("{}")
    with pytest.raises(RuntimeError, match="ended without a step"):
        startup.first_step(tmp_path, recipe)()


def test_make_bench_runs_every_benchmark():
    for name in NAMES:
        assert callable(importlib.import_module(f"benchmarks.{name}").main)
    others = {p.stem for p in (ROOT / "benchmarks").glob("[a-z]*.py")} - set(NAMES)
    assert others == {"harness", "memory", "textbook"}


@pytest.mark.parametrize(
    "parts",
    [["loading", "finetuning"], pytest.param(["parity", "kernels", "dense", "moe", "evaluation"], marks=pytest.mark.slow)],
    ids=len,
)
def test_the_acceptance_of_a_gpu_runs_in_its_toy_form(tmp_path, parts):
    """Each part in a process of its own, as on a GPU; parity holds here too."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--parts", *parts]
    command += ["--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert any("images_per_s" in row for row in rows)
    if "moe" in parts:
        assert {"images_per_s", "plan_gib", "dispatch_share"} <= next(row for row in rows if "8E2A" in row["case"]).keys()
    assert "| case | what |" in (tmp_path / "gpu.md").read_text()


def test_a_part_that_does_not_fit_into_the_gpu_is_named_and_skipped(monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline, "sampling", too_large)
    monkeypatch.setattr(training, "measure", too_large)
    (row,) = acceptance.run_part("sampling", None)
    assert (row["case"], row["what"]) == ("sampling", "skipped: it needs more memory than this GPU has free")
    assert acceptance.failures([row]) == []
    with pytest.raises(torch.OutOfMemoryError):  # the plan has said that it fits
        acceptance.run_part("dense", None)


def test_parity_of_the_acceptance_holds_and_can_fail(monkeypatch):
    limit = 4 * 2.0**-8
    assert parity._experts() <= limit
    assert parity._attention() <= limit
    real = parity.grouped_mlp.grouped_mlp
    monkeypatch.setattr(parity.grouped_mlp, "grouped_mlp", lambda *arguments: 1.02 * real(*arguments))
    assert parity._experts() > limit


def test_without_a_gpu_the_acceptance_offers_the_toy_form(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    log = tmp_path / "log"
    assert run_script(log, "-m", "benchmarks.gpu") == 2
    assert log.read_text().count("\n") == 1
    assert "--toy" in log.read_text()
