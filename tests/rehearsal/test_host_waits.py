"""A training step waits for the GPU nowhere but where it is said here, with the reason."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from host_waits import HostWaits, use_grouped_products
from shrinking import RECIPES, prepare_places, rehearsed_ranks, stage_of

from dpt.config.checks import batch_split
from dpt.config.recipe import Recipe, load_recipe
from tests.gloo import run_ranks

STEPS, LOG_EVERY, RECORDED = 4, 3, (1, 3)
"""Steps, and those after which a record is written: the first one, and every LOG_EVERY."""

HERE = "moves to the device of the training, which is the CPU here"
ON_CPUS = "numbers in the CPU's memory: no wait"
RECORD = "the record"
CHECK = "once all is computed: whether the gradient is finite, its norm, and how far to clip"
START = "whether all ranks partition the same parameters"
ALLOWED: dict[tuple[str, str], tuple[str, str]] = {  # (place, what) -> how often (`_most`), why
    ("deepspeed", "to the CPU"): ("any", HERE),  # in any place of its
    ("deepspeed/stage_1_and_2.py:has_overflow", "_local_scalar_dense"): ("check", CHECK),
    ("deepspeed/utils.py:<listcomp>", "_local_scalar_dense"): ("start", START),
    ("deepspeed/utils.py:assert_lst_len_same_as_other_ranks", "_local_scalar_dense"): ("start", START),
    ("deepspeed/utils.py:assert_lst_len_same_as_other_ranks", "cpu"): ("start", START),
    ("deepspeed/utils.py:clip_tensors_by_global_norm", "_local_scalar_dense"): ("check", CHECK),
    ("deepspeed/utils.py:get_lst_from_rank0", "cpu"): ("start", START),
    ("deepspeed/utils.py:get_norm_with_moe_layers", "_local_scalar_dense"): ("check", CHECK),
    ("deepspeed/utils.py:is_invalid_grad_norm", "_local_scalar_dense"): ("check", CHECK),
    ("deepspeed/utils.py:to_tensor", "_local_scalar_dense"): ("check", CHECK),
    ("diffusion/noise.py:_upsampling", "to the CPU"): ("any", HERE),
    ("distributed.py:all_reduce_sum", "tolist"): ("record", RECORD),
    ("models/dit.py:update_router_bias", "to the CPU"): ("any", HERE),
    ("models/experts.py:reset_parameters", "_local_scalar_dense"): ("start", "the teacher is made; " + ON_CPUS),
    ("models/moe_parallel.py:_run_experts", "tolist"): ("layer", "the sizes of what ranks exchange"),
    ("training/deepspeed_internals.py:grad_norm", "_local_scalar_dense"): ("check", CHECK),
    ("training/engine.py:step", "_local_scalar_dense"): ("check", CHECK),
    ("training/engine.py:step", "to the CPU"): ("any", HERE),
    ("training/records.py:experts", "_local_scalar_dense"): ("record", RECORD),
    ("training/records.py:experts", "cpu"): ("record", RECORD),
    ("training/records.py:experts", "tolist"): ("record", RECORD),
    ("training/records.py:means", "tolist"): ("record", RECORD),
    ("training/step.py:<dictcomp>", "to the CPU"): ("any", HERE),
    ("training/step.py:_check_labels", "_local_scalar_dense"): ("micro-batch", ON_CPUS),
}
SELF_ALIGNED = {
    "training.self_alignment.weight": 0.2,
    "training.self_alignment.student_block": 1,
    "training.self_alignment.teacher_block": 2,
}
CASES = {
    "dense, ZeRO 1, bf16, flips": ("dense_a1", {}),
    "dense, ZeRO 2, bf16": ("dense_a5", {}),
    "dense, ZeRO 0": ("cpu_zero0", {}),
    "dense, ZeRO 3": ("cpu_zero3", {}),
    "experts": ("moe_s2_8e", {"training.ema_warmup": True, "model.router_bias_balancing": True}),
    "upcycled experts on 2 ranks, recomputed": ("upcycle_generalist", {}),
    "self-aligned, ZeRO 2, bf16": ("dense_a5", SELF_ALIGNED),
    "self-aligned experts on 2 ranks": ("cpu_ep2", SELF_ALIGNED),
    "embeddings, noise of several resolutions": ("finetune_amodal", {"diffusion.multires_noise_strength": 0.9}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_only_where_it_must(name: str, tmp_path: Path) -> None:
    stem, changed = CASES[name]
    path = next(path for path in RECIPES if path.stem == stem)
    recipe, fields = load_recipe(path), prepare_places(path, tmp_path)
    more = {"training.steps": 100, "training.log_every": LOG_EVERY, "training.compile": False}
    fields = {**fields, **more, **changed}
    for steps in run_ranks(
        rehearsed_ranks(recipe), _count_waits, str(path), stage_of(stem), fields, timeout_s=300.0, as_launched=True
    ):
        for step, waits in enumerate(steps, 1):
            most = _most(load_recipe(path, fields), step)
            beyond = {(place, what): n for (place, what), n in waits.items() if n > most.get(_how_often(place, what), 0)}
            assert not beyond, f"step {step}"


def _how_often(place: str, what: str) -> str:
    """The table's word for a place; empty: never."""
    never = ("", "")
    return ALLOWED.get((place, what), ALLOWED.get((place.split("/")[0], what), never))[0]


def _most(recipe: Recipe, step: int) -> dict[str, int]:
    """How often a place may wait in the `step`-th step, by the words of the table."""
    ranks, training = rehearsed_ranks(recipe), recipe.dpt.training
    micro_batches = batch_split(recipe, ranks)[2]
    passes = micro_batches * (2 if training.activation_checkpointing else 1)
    return {
        "any": sys.maxsize,
        "check": 3,
        "layer": passes * recipe.dpt.model.depth,
        "micro-batch": 2 * micro_batches,
        "record": 2 if step in RECORDED else 0,
        "start": sys.maxsize if step <= 2 else 0,
    }


def _count_waits(path: str, stage: str, fields: dict[str, Any]) -> list[dict[tuple[str, str], int]]:
    """Host waits of each of STEPS steps: preparation, forward and backward passes, update, record."""
    from dpt.training import loop, records, watchdog

    records.measure_peak_flops = lambda *_: 1e12
    watchdog.Watchdog.__init__.__kwdefaults__["interval_s"] = 0.1  # type: ignore[index]
    trainer = loop.Trainer(load_recipe(path, fields), stage, None)
    done: list[dict[tuple[str, str], int]] = []
    write, waits = trainer.recorder.step_done, HostWaits()

    def step_done(*arguments: Any, **more: Any) -> None:
        write(*arguments, **more)
        done.append(dict(waits.found))
        waits.found.clear()

    trainer.recorder.step_done = step_done  # type: ignore[method-assign]
    trainer._agree_to_stop = lambda: len(done) == STEPS  # type: ignore[method-assign]
    trainer._leave = lambda: None  # type: ignore[method-assign]
    use_grouped_products()
    with waits:
        trainer._train()
    trainer.close("KILLED")
    assert ("_grouped_mm" in waits.operators) == (trainer.config.model.num_experts > 0)
    return done


def test_the_watch_sees_what_waits() -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    counts = torch.tensor([1, 3])
    cases: dict[str, Any] = {
        "_local_scalar_dense": lambda: float(x.sum()),
        "nonzero": lambda: mask.nonzero(),
        "index by a mask": lambda: x[mask],
        "masked_select": lambda: x.masked_select(mask),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "to the CPU": lambda: x.to("cpu"),
        "numpy": lambda: x.numpy(),
        "repeat_interleave of unknown length": lambda: x[:2].repeat_interleave(counts),
    }
    for what, call in cases.items():
        with HostWaits() as waits:
            call()
        assert any(found == what for _, found in waits.found), what
    with HostWaits() as waits:
        weight = torch.ones(4, requires_grad=True)
        (x * weight).sum().backward()
        x[:2].repeat_interleave(counts, output_size=4)
        x[torch.tensor([0, 2])] += 1
    assert waits.found == Counter()
