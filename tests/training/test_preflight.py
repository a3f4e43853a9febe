"""What a machine cannot hold is refused before any work, with what is needed and what fits instead."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dpt import distributed
from dpt.config.recipe import Recipe, load_recipe
from dpt.errors import UserError
from dpt.training import preflight
from dpt.training.preflight import Available, Needs

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "ds_configs"
GIB = 2**30


def _on_cpus(gib: float) -> Callable[[], Available]:
    return lambda: Available(device=int(gib * GIB), host=None)


def _refusal(recipe: Recipe, required: Needs, free: Available) -> str:
    with pytest.raises(UserError) as error:
        preflight.check_memory(recipe, "pretrain", required, free)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_recipe_for_a_cluster_is_refused_with_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available", _on_cpus(8))
    recipe = load_recipe(RECIPES / "moe_l2.json")
    with pytest.raises(UserError) as error:
        preflight.check_ranks(recipe, "pretrain", 1)
    message = str(error.value)
    for part in ("moe_l2.json", "GiB on each of 8 ranks", "data/shards/imagenet_256/train", "here is 1 rank with 8.0 GiB"):
        assert part in message
    assert "quickstart.json fits" in message or "dense_a1.json fits" in message
    assert "\n" not in message


def test_ranks_that_do_not_divide_are_no_question_of_memory() -> None:
    with pytest.raises(UserError, match="ep_size 8 does not divide 12 ranks"):
        preflight.check_ranks(load_recipe(RECIPES / "moe_l2.json", {"train_batch_size": 240}), "pretrain", 12)
    with pytest.raises(UserError, match="model is dense"):
        preflight.check_ranks(load_recipe(RECIPES / "dense_a1.json", {"training.ep_size": 2}), "pretrain", 1)
    with pytest.raises(UserError, match="train_batch_size 256 is not a multiple of 24 ranks"):
        preflight.check_ranks(load_recipe(RECIPES / "moe_l2.json"), "pretrain", 24)


def test_too_little_free_memory_is_refused_unless_the_recipe_says_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(RECIPES / "dense_a6.json")
    required = preflight.check_ranks(recipe, "pretrain", 8)
    assert required.ranks == 8
    assert required.bytes_per_rank < 80 * GIB
    preflight.check_memory(recipe, "pretrain", required, Available(device=required.bytes_per_rank, host=0))
    short = Available(device=required.bytes_per_rank - 1, host=0)
    message = _refusal(recipe, required, short)
    assert "this machine cannot hold it" in message
    assert 'set dpt.training.check_memory to "warn"' in message
    assert capsys.readouterr().out == ""
    preflight.check_memory(load_recipe(recipe.path, {"training.check_memory": "warn"}), "pretrain", required, short)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Warning: ")
    assert line.endswith('; going on, since dpt.training.check_memory is "warn".')


def test_every_ranks_free_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another rank lacks stops this one too."""
    recipe = load_recipe(RECIPES / "dense_a6.json")
    required = preflight.needs(recipe, "pretrain", 8)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, "rank 1 has too little"])
    assert "rank 1 has too little" in _refusal(recipe, required, Available(device=required.bytes_per_rank, host=0))


def test_upcycling_counts_its_experts() -> None:
    recipe = load_recipe(RECIPES / "upcycle_depth_a2.json")
    assert preflight.needs(recipe, "upcycle", 8).bytes_per_rank > preflight.needs(recipe, "finetune", 8).bytes_per_rank


def test_offloaded_bytes_are_counted_on_the_host() -> None:
    fields: dict[str, Any] = {"zero_optimization.stage": 2}
    plain = preflight.needs(load_recipe(RECIPES / "dense_a6.json", fields), "pretrain", 8)
    fields["zero_optimization.offload_optimizer"] = {"device": "cpu"}
    recipe = load_recipe(RECIPES / "dense_a6.json", fields)
    moved = preflight.needs(recipe, "pretrain", 8)
    states = plain.memory.master_weights + plain.memory.moments + plain.memory.ema
    assert moved.memory.host > states
    assert moved.bytes_per_rank <= plain.bytes_per_rank - states
    assert f" in all and {moved.memory.host / GIB:.2f} offloaded to the host." in moved.plan
    assert "host" not in plain.plan
    # On a GPU each has its place; without one all is the host's memory.
    device, host = moved.bytes_per_rank, moved.memory.host
    preflight.check_memory(recipe, "pretrain", moved, Available(device=device, host=host))
    assert "offloading needs" in _refusal(recipe, moved, Available(device=device, host=host - 1))
    preflight.check_memory(recipe, "pretrain", moved, Available(device=device + host, host=None))
    assert "cannot hold it" in _refusal(recipe, moved, Available(device=device + host - 1, host=None))


def test_class_pictures_are_part_of_the_plan() -> None:
    """One rank of 64 computes 4 samples at once, but draws with a copy of the whole network."""
    moe = {"zero_optimization.stage": 2}
    assert "pictures" in preflight.needs(load_recipe(RECIPES / "moe_l2.json", moe), "pretrain", 64).plan
    assert "pictures" not in preflight.needs(load_recipe(RECIPES / "finetune_depth_moe_l2.json", moe), "finetune", 64).plan


# --- with a GPU, as far as that can be had without one ------------------------------------------------------------------


class _Reached(Exception):
    """The launcher has come as far as the test follows it."""


@pytest.fixture
def cuda_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of CUDA, on rank 3 of 4."""
    calls: list[str] = []
    fake = {
        "is_available": lambda: True,
        "set_device": lambda device: calls.append(f"set_device {device}"),
        "mem_get_info": lambda: calls.append("mem_get_info") or (10 * GIB, 80 * GIB),
        "_lazy_init": lambda: calls.append("context"),
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    return calls


def test_free_memory_of_the_ranks_own_gpu_counts(cuda_calls: list[str]) -> None:
    assert preflight.available().device == 10 * GIB
    host = preflight.available().host
    assert host is not None
    assert 0 < host < psutil.virtual_memory().total / 4


@pytest.mark.parametrize("launcher", ["pretrain", "finetune", "upcycle", "evaluate"])
def test_no_launcher_asks_cuda_for_anything_before_it_has_set_its_device(
    launcher: str, cuda_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"pretrain": "dense_a3", "upcycle": "upcycle_depth_a2"}.get(launcher, "finetune_depth_a3")
    monkeypatch.setattr("sys.argv", [launcher, "--ds_config", str(RECIPES / f"{recipe}.json"), "--local_rank=3"])

    def reached(message: str = "") -> None:
        raise _Reached

    if launcher != "evaluate":
        monkeypatch.setattr(distributed, "init", reached)
    else:
        monkeypatch.setattr(distributed, "_unneeded", reached)  # DeepSpeed is about to be imported
    with pytest.raises(_Reached):
        runpy.run_path(str(ROOT / "launchers" / f"{launcher}.py"), run_name="__main__")
    assert cuda_calls == ["set_device 3", "mem_get_info"][: 1 if launcher == "evaluate" else 2]


def test_the_device_is_set_before_deepspeed_is_loaded(cuda_calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls `init`, launcher or not."""

    def reached(package: str) -> None:
        raise _Reached

    monkeypatch.setattr(distributed, "_unneeded", reached)
    with pytest.raises(_Reached):
        distributed.init()
    assert cuda_calls == ["set_device 3"]
