"""A training step waits for the GPU nowhere but where it is said here, with the reason."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from host_waits import HostWaits, use_grouped_products
from rehearsals import join_deepspeed, load_once
from shrinking import RECIPES, prepare_places, rehearsed_ranks, stage_of

from dpt.config.recipe import load_recipe
from dpt.data.manifest import VAERecord
from tests.gloo import run_ranks

STEPS, LOG_EVERY, RECORDED = 4, 3, (1, 3)
"""Steps, and those after which a record is written: the first one, and every LOG_EVERY."""

Table = dict[tuple[str, str], tuple[str, str]]
ALLOWED: Table = {  # (place, what) -> how often, why
    ("training/step.py:_check_labels", "_local_scalar_dense"): ("micro-batch", "labels in the CPU's memory: no wait"),
    ("diffusion/noise.py:multires_noise", "tolist"): ("micro-batch", "numbers drawn in the CPU's memory: no wait"),
    ("diffusion/noise.py:_upsampling", "to the CPU"): ("any", "a table, made once, to the training's device"),
    ("diffusion/noise.py:_spread", "_local_scalar_dense"): ("any", "a number of that table, once, in the CPU's memory"),
    ("training/step.py:<dictcomp>", "to the CPU"): ("any", "to the device of the training, which is the CPU here"),
    ("models/mlp.py:_sums", "_local_scalar_dense"): ("any", "one_hot checks its bounds on CPUs alone"),
    ("models/grouped_mlp.py:_sums", "_local_scalar_dense"): ("any", "one_hot checks its bounds on CPUs alone"),
    ("models/moe_parallel.py:_run_experts", "tolist"): ("layer", "the rows that ranks exchange: their sizes must be known"),
    ("training/engine.py:step", "_local_scalar_dense"): ("step", "whether the step counts, after DeepSpeed's own check"),
    ("training/deepspeed_internals.py:grad_norm", "_local_scalar_dense"): ("step", "the same"),
    ("training/engine.py:step", "to the CPU"): ("any", "gradients' norms to one device, which is the CPU here"),
    ("models/dit.py:update_router_bias", "to the CPU"): ("any", "counts to the biases' device, which is the CPU here"),
    ("training/records.py:means", "tolist"): ("record", "the record"),
    ("training/records.py:experts", "cpu"): ("record", "the record"),
    ("training/records.py:experts", "tolist"): ("record", "the record"),
    ("training/records.py:experts", "_local_scalar_dense"): ("record", "the record"),
    ("distributed.py:all_reduce_sum", "tolist"): ("record", "the record"),
}
DEEPSPEED = "once a step, when all of it is computed: whether the gradient is finite, and how far to clip"
DEEPSPEEDS_CHECKS = {
    "is_invalid_grad_norm",
    "clip_tensors_by_global_norm",
    "get_norm_with_moe_layers",
    "to_tensor",
    "has_overflow",
}
DEEPSPEEDS_FIRST = {"assert_lst_len_same_as_other_ranks", "get_lst_from_rank0", "<listcomp>"}
"""Of the first two steps with ZeRO 3: whether all ranks partition the same parameters."""
CASES = {
    "dense, ZeRO 1, bf16, flips": ("dense_a1", {}),
    "dense, ZeRO 2, bf16": ("dense_a5", {}),
    "dense, ZeRO 0": ("cpu_zero0", {}),
    "dense, ZeRO 3": ("cpu_zero3", {}),
    "experts": ("moe_s2_8e", {"training.ema_warmup": True, "model.router_bias_balancing": True}),
    "upcycled experts on 4 ranks, recomputed": ("upcycle_generalist", {}),
    "embeddings, noise of several resolutions": ("finetune_amodal", {"diffusion.multires_noise_strength": 0.9}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_only_where_it_must(name: str, tmp_path: Path) -> None:
    load_once()
    stem, changed = CASES[name]
    path = next(path for path in RECIPES if path.stem == stem)
    vae = VAERecord(name="none", sha256="0" * 64, scaling_factor=1.0, latent_channels=4)
    recipe, fields = load_recipe(path), prepare_places(path, tmp_path, vae)
    more = {"training.steps": 100, "training.log_every": LOG_EVERY, "training.compile": False}
    fields = {**fields, **more, **changed}
    for steps in run_ranks(rehearsed_ranks(recipe), _count_waits, str(path), stage_of(stem), fields, timeout_s=300.0):
        for number, waits in enumerate(steps, 1):
            unexpected = _beyond(waits, load_recipe(path, fields), first=number <= 2, recorded=number in RECORDED)
            assert not unexpected, f"step {number}: {unexpected}"


def _beyond(waits: dict[tuple[str, str], int], recipe: Any, *, first: bool, recorded: bool) -> dict[tuple[str, str], int]:
    """The waits of a step that the table does not allow, or not so often."""
    training = recipe.dpt.training
    split = recipe.deepspeed["train_batch_size"] // recipe.deepspeed.get("train_micro_batch_size_per_gpu", 1 << 30)
    micro_batches = max(1, split // rehearsed_ranks(recipe))
    passes = micro_batches * (2 if training.activation_checkpointing else 1)
    most = {"any": 1 << 30, "step": 1, "micro-batch": 2 * micro_batches, "layer": passes * recipe.dpt.model.depth}
    most["record"] = 2 if recorded else 0
    left = {}
    for (place, what), count in waits.items():
        file, _, function = place.partition(":")
        by_deepspeed = file.startswith("deepspeed/")
        if by_deepspeed and (what == "to the CPU" or (function in DEEPSPEEDS_CHECKS and count <= 3)):
            continue  # to DeepSpeed's device, which is the CPU here; or DEEPSPEED
        if by_deepspeed and function in DEEPSPEEDS_FIRST and first:
            continue
        how_often, _ = ALLOWED.get((place, what), ("", ""))
        if count > most.get(how_often, 0):
            left[place, what] = count
    return left


def _count_waits(path: str, stage: str, fields: dict[str, Any]) -> list[dict[tuple[str, str], int]]:
    """Host waits of each of STEPS steps: preparation, forward and backward passes, update, record."""
    from dpt.training import loop

    join_deepspeed()
    loop.measure_peak_flops = lambda *_: 1e12
    loop.Watchdog.__init__.__kwdefaults__["interval_s"] = 0.1  # type: ignore[index]
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
    trainer._close("KILLED")
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
