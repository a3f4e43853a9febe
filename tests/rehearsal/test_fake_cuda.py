"""Forward passes on fake CUDA tensors: nothing is left on the CPU, and no shape or branch depends on numbers."""

from collections import Counter
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, fake_cuda, fake_network, put_on_gpu
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.train_step import random_batch
from dpt.config.presets import preset_values
from dpt.config.recipe import load_recipe
from dpt.config.sections import DiffusionConfig, ModelConfig
from dpt.data.codec import LatentScaling
from dpt.diffusion import noise
from dpt.diffusion.objective import DiffusionObjective
from dpt.diffusion.samplers import guide, make_plan, sample
from dpt.training import step
from dpt.training.step import LossModule, Preparation

UPCYCLED = {"num_experts": 8, "top_k": 2, "expert_activation": "gelu", "normalize_top_k": True}
GENERALIST = {"num_conditions": 2, "num_classes": 1004, "patch_embed_tasks": 4, "clip_embedding_size": 768}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{size: (size, {}) for size in ("a1", "a2", "a3", "a4", "a5", "a6", "XL/2")},
    **{size: (size, {}) for size in ("S/2-8E2A", "S/2-16E2A", "L/2-8E2A")},
    "without a shared expert": ("S/2-8E2A", {"shared_expert_width": 0}),
    "routing biases": ("S/2-8E2A", {"router_bias_balancing": True}),
    "upcycled": ("XL/2", UPCYCLED),
    "generalist": ("XL/2", GENERALIST),
    "upcycled generalist": ("XL/2", {**UPCYCLED, **GENERALIST}),
    "query norm": ("a1", {"qk_norm": True}),
    "convolutions": ("a1", {"mlp_kernel_size": 3}),
    "diffusers": ("XL/2", {"mlp_norm_eps": 1e-5, "timestep_features": "diffusers"}),
}
"""Preset and further fields; two blocks of each, at full width."""


@pytest.fixture(autouse=True)
def _no_question_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass may not ask the GPU, nor wait for it, but for its generation, once: here Hopper."""

    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("the forward pass asks the GPU")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for name in ("get_device_properties", "mem_get_info", "synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, asked)


def _arguments(network: Any, dtype: torch.dtype, side: int = 32, batch: int = 2) -> tuple[Any, ...]:
    config = network.config
    return (
        torch.randn(batch, network.in_channels, side, side, device=CUDA, dtype=dtype),
        torch.randint(0, 1000, (batch,), device=CUDA),
        torch.randint(0, config.num_classes, (batch,), device=CUDA),
        torch.randn(batch, config.clip_embedding_size, device=CUDA) if config.clip_embedding_size else None,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_pass_stays_on_the_gpu(name: str) -> None:
    preset, fields = FAMILIES[name]
    config = ModelConfig(**preset_values(preset) | {"depth": 2} | fields)
    with fake_cuda() as mode:
        network = fake_network(mode, config, torch.bfloat16)
        for side in (32, 64):
            out = network(*_arguments(network, torch.bfloat16, side))
            assert {value.device for value in out if isinstance(value, Tensor)} == {CUDA}
            assert out.prediction.shape == (2, 8, side, side)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["a1", "generalist"])
def test_other_types_too(name: str, dtype: torch.dtype) -> None:
    """Dense networks: grouped products are known to PyTorch's fake tensors in bf16 alone."""
    preset, fields = FAMILIES[name]
    with fake_cuda() as mode:
        network = fake_network(mode, ModelConfig(**preset_values(preset) | {"depth": 2} | fields), dtype)
        assert network(*_arguments(network, dtype)).prediction.device == CUDA


RECIPES = {
    "dense_xl2_256": {},
    "moe_s2_8e": {},
    "finetune_amodal": {},
    "finetune_generalist": {},
    "finetune_depth": {},
    "upcycle_generalist": {},
    "quickstart": {"diffusion.min_snr_gamma": 5.0},
    "quickstart_depth": {"diffusion.prediction_type": "rectified_flow"},
    "moe_l2": {
        "data.horizontal_flip": False,
        "training.self_alignment.weight": 0.2,
        "training.self_alignment.student_block": 1,
        "training.self_alignment.teacher_block": 2,
        "training.feature_alignment.weight": 0.5,
        "training.feature_alignment.block": 1,
        "training.feature_alignment.channels": 3,
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_preparation_and_loss_stay_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a batch of the stream on the CPU to the losses of a micro-batch and their sums, in as many calls for any batch."""
    from shrinking import ROOT

    from dpt.config.checks import trained_model
    from dpt.training.records import StepSums

    recipe = load_recipe(ROOT / "ds_configs" / f"{name}.json", {"model.depth": 2, "model.input_size": 16, **RECIPES[name]})
    model = trained_model(recipe, "upcycle" if "upcycle" in name else "pretrain")
    monkeypatch.setattr(step, "_check_labels", lambda *_: None)  # on the batch in the CPU's memory, so nothing waits
    monkeypatch.setattr(noise, "_upsampling", noise._upsampling.__wrapped__)  # no fake matrix may stay
    tasks = {"class": ["class"], "generalist": ["depth", "flow", "amodal"]}.get(recipe.dpt.task, [recipe.dpt.task])
    with fake_cuda() as mode:
        with unset_fake_temporarily():  # projectors are drawn
            module = LossModule(fake_network(mode, model, torch.bfloat16), recipe.dpt)
        module.objective = DiffusionObjective(recipe.dpt.diffusion)
        put_on_gpu(mode, module.alignment, torch.bfloat16)
        if module.teacher is not None:
            module.teacher.network = fake_network(mode, module.teacher.config, torch.bfloat16)
        prepare = Preparation(recipe.dpt, tasks=tasks, scaling=LatentScaling(scale=0.18215), device=CUDA, dtype=torch.bfloat16)
        calls = []
        for size in (2, 4, 6):  # the first fills caches
            with _Calls() as counted:
                inputs = prepare(random_batch(recipe.dpt, size))
                losses = module(*inputs)
            calls.append(counted.counts)
            assert {value.device for value in inputs if value is not None} == {CUDA}
        assert calls[1] == calls[2]
        assert {value.device for value in losses} == {CUDA}
        sums = StepSums()
        sums.add(losses)
        assert sums.losses is not None
        assert sums.losses.device == CUDA


class _Calls(TorchDispatchMode):
    """Counts operators: on a GPU, each that is no view launches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", ["ddim", "ddim with noise", "ddpm", "dpmsolver++"])
def test_samplers_stay_on_the_gpu(sampler: str) -> None:
    """Guided sampling from a network's predictions; nothing waits between its steps."""
    name, eta = (sampler, 0.0) if sampler != "ddim with noise" else ("ddim", 1.0)
    plan = make_plan(DiffusionConfig(), num_inference_steps=4, sampler=name, eta=eta)
    with fake_cuda() as mode:
        network = fake_network(mode, ModelConfig(**preset_values("S/2-8E2A") | {"depth": 2}), torch.bfloat16)
        labels = torch.randint(0, 1000, (4,), device=CUDA)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return network(noisy.to(torch.bfloat16), timesteps, labels).prediction

        denoise = guide(predict, scale=4.0, channels=4, guided_channels=3)
        seeds = torch.randint(0, 1000, (2,), device=CUDA)
        latents = sample(denoise, torch.randn(2, 4, 32, 32, device=CUDA), plan, seeds=seeds)
        assert (latents.device, latents.dtype, latents.shape) == (CUDA, torch.float32, (2, 4, 32, 32))
