"""Aligned hidden states: the formulas, what the network gives and the teacher is, what is counted and refused."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch.utils import flop_counter
from training_toys import random_network

from benchmarks.memory import LiveBytes
from dpt.config.checks import check_recipe
from dpt.config.command import parse_command
from dpt.config.recipe import DptConfig, Recipe
from dpt.config.sections import (
    DataConfig,
    DiffusionConfig,
    FeatureAlignmentConfig,
    ModelConfig,
    SelfAlignmentConfig,
    TrainingConfig,
)
from dpt.data.codec import LatentScaling
from dpt.errors import UserError
from dpt.models.dit import DiT
from dpt.models.memory import memory
from dpt.models.recipe_costs import alignment_bytes, alignment_params, recipe_macs
from dpt.training.alignment import feature_alignment_loss, self_alignment_loss
from dpt.training.preflight import needs
from dpt.training.step import Inputs, LossModule, Preparation
from tests.models.test_costs import ATTENTION_FLOPS

UNSCALED = LatentScaling(scale=1.0)
MODEL = ModelConfig(input_size=8, hidden_size=32, depth=4, num_heads=2, num_classes=8)
OWN = SelfAlignmentConfig(weight=0.2, student_block=1, teacher_block=3)
FEATURES = FeatureAlignmentConfig(weight=0.5, block=2, channels=3, projector_width=24)
EXPERTS = {"num_experts": 4, "top_k": 2, "shared_expert_width": 16}


def config(training: dict[str, Any] | None = None, **model: Any) -> DptConfig:
    fields: dict[str, Any] = {"self_alignment": OWN, "feature_alignment": FEATURES, **(training or {})}
    return DptConfig(model=dataclasses.replace(MODEL, **model), training=TrainingConfig(ema_decays=[0.9, 0.5], **fields))


def preparation(settings: DptConfig) -> Preparation:
    return Preparation(settings, tasks=["class"], scaling=UNSCALED, device=torch.device("cpu"), dtype=torch.float32)


def batch(count: int = 3) -> dict[str, Any]:
    moments = torch.randn(count, 2, 4, 8, 8).half()
    features = torch.randn(count, 3, 8, 8).half()
    features[0, :, :2, :4] = 0.0  # two tokens of the first sample are unknown
    features[1] = 0.0
    labels = torch.tensor([1, 7, 3])[:count]
    return {
        "label": labels,
        "latents": moments,
        "features": features,
        "sample_index": torch.arange(count),
        "key": ["a"] * count,
    }


def module_and_inputs(settings: DptConfig) -> tuple[LossModule, Inputs]:
    """A module whose teacher is the network itself, and what it takes."""
    module = LossModule(random_network(settings.model), settings)
    if module.teacher is not None:
        module.teacher.network = DiT(module.teacher.config)
        state = module.network.state_dict()
        module.teacher.network.load_state_dict({name: state[name] for name in module.teacher.network.state_dict()})
    return module, preparation(settings)(batch())


def block_output(network: DiT, block: int, inputs: Inputs, *, teacher: bool) -> torch.Tensor:
    found = []
    hook = network.blocks[block - 1].register_forward_hook(lambda _, args, out: found.append(out[0]))
    latents, times = (inputs.teacher_input, inputs.teacher_timesteps) if teacher else (inputs.network_input, inputs.timesteps)
    with torch.no_grad():
        network(latents, times, inputs.labels, task_labels=inputs.task_labels)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("model", [{}, EXPERTS], ids=["dense", "experts"])
def test_losses_are_those_of_a_few_lines(model: dict[str, Any]) -> None:
    settings = config(**model)
    module, inputs = module_and_inputs(settings)
    losses = module(*inputs)
    student, taught, middle = (
        block_output(module.network, block, inputs, teacher=teacher) for block, teacher in ((1, False), (3, True), (2, False))
    )
    error = (module.alignment["self"](student) - taught).abs()
    smooth = torch.where(error < 0.05, error**2 / 0.1, error - 0.025).mean()
    assert losses.self_alignment.item() == pytest.approx(smooth.item(), rel=1e-5)
    assert inputs.features is not None
    parts = []
    for hidden, maps in zip(module.alignment["features"](middle), inputs.features.float(), strict=True):
        cosines = []
        for token, projected in enumerate(hidden):
            row, col = divmod(token, 4)
            mean = maps[:, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].mean(dim=(1, 2))
            if mean.abs().sum():
                cosines.append(1 - projected @ mean / projected.norm() / mean.norm())
        parts.append(torch.stack(cosines).mean() if cosines else torch.zeros(()))
    assert losses.feature_alignment.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-4)
    weights = settings.training.balance_loss_weight
    total = losses.loss + 0.2 * losses.self_alignment + 0.5 * losses.feature_alignment + weights * losses.balance
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-6)


def test_gradients_reach_the_blocks_up_to_the_aligned_ones_and_no_teacher() -> None:
    module, inputs = module_and_inputs(config())
    losses = module(*inputs)
    own = module.alignment.project("self", torch.randn(1, 16, 32, requires_grad=True))
    assert self_alignment_loss(own, torch.zeros(1, 16, 32)).requires_grad
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert module.teacher is not None
    assert module.teacher.network is not None
    assert all(parameter.grad is None for parameter in module.teacher.network.parameters())
    assert "teacher" not in " ".join(name for name, _ in module.named_parameters())


def test_the_teacher_sees_less_noise_and_the_same_rest() -> None:
    settings = config({"self_alignment": dataclasses.replace(OWN, offset_low=0.1, offset_high=0.2)})
    torch.manual_seed(0)
    prepare = preparation(settings)
    many = {
        name: value.repeat(200, *[1] * (value.dim() - 1)) for name, value in batch().items() if isinstance(value, torch.Tensor)
    }
    many |= {"sample_index": torch.arange(600), "key": ["a"] * 600}
    inputs = prepare(many)
    assert inputs.teacher_timesteps is not None
    assert inputs.teacher_input is not None
    steps = inputs.timesteps - inputs.teacher_timesteps
    free = inputs.timesteps >= 200
    assert steps[free].min() >= 100
    assert steps[free].max() <= 200
    assert steps[free].float().std() > 20
    assert inputs.teacher_timesteps.min() >= 0
    expected = prepare.objective.add_noise(inputs.latents, inputs.noise, inputs.teacher_timesteps)
    torch.testing.assert_close(inputs.teacher_input, expected)
    half = prepare({name: value[300:] for name, value in many.items()})
    assert torch.equal(half.teacher_timesteps, inputs.teacher_timesteps[300:])  # it belongs to the sample


def test_features_of_any_grid_are_averaged_over_the_tokens() -> None:
    projected = torch.randn(2, 4, 3)
    coarse = projected.mT.reshape(2, 3, 2, 2)
    assert feature_alignment_loss(projected, coarse, (2, 2)).item() == pytest.approx(0.0, abs=1e-6)
    assert feature_alignment_loss(projected, -coarse.repeat_interleave(4, 2).repeat_interleave(4, 3), (2, 2)).item() == (
        pytest.approx(2.0, abs=1e-6)
    )
    assert feature_alignment_loss(projected, torch.zeros(2, 3, 5, 5), (2, 2)).item() == 0.0


def test_the_network_starts_and_computes_as_without_them() -> None:
    found = []
    for training in ({}, {"self_alignment": SelfAlignmentConfig(), "feature_alignment": FeatureAlignmentConfig()}):
        torch.manual_seed(0)
        module = LossModule(DiT(MODEL), config(training))
        torch.manual_seed(1)
        inputs = preparation(config(training))(batch())
        found.append((module.network.state_dict(), inputs.network_input, torch.rand(3)))
    for name, tensor in found[0][0].items():
        assert torch.equal(tensor, found[1][0][name])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])  # the projectors took no random numbers


@pytest.mark.parametrize("model", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("off", ["self_alignment", "feature_alignment", ""])
def test_macs_equal_torchs_counter(model: dict[str, Any], off: str) -> None:
    settings = config({off: dataclasses.replace(getattr(config().training, off), weight=0.0)} if off else None, **model)
    module, inputs = module_and_inputs(settings)
    with flop_counter.FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        module(*inputs).total.backward()
    expected = recipe_macs(settings, settings.model)
    assert counter.get_total_flops() == 2 * 3 * (expected.training + expected.attention_recompute)
    assert expected.training > recipe_macs(DptConfig(model=settings.model), settings.model).training
    assert expected.forward == recipe_macs(DptConfig(model=settings.model), settings.model).forward
    assert alignment_params(settings.training, settings.model) == sum(p.numel() for p in module.alignment.parameters())


def test_memory_counts_the_projectors_and_the_teacher() -> None:
    def plan(settings: DptConfig) -> Any:
        return needs(Recipe(deepspeed={"train_batch_size": 8}, dpt=settings), "pretrain", 1)

    plain, aligned = plan(DptConfig(model=MODEL, training=TrainingConfig(ema_decays=[0.9, 0.5]))), plan(config())
    module, _ = module_and_inputs(config())
    assert module.teacher is not None
    assert module.teacher.network is not None
    projectors = sum(p.numel() for p in module.alignment.parameters())
    assert aligned.memory.weights - plain.memory.weights == 4 * projectors
    assert aligned.memory.moments - plain.memory.moments == 8 * projectors
    assert aligned.memory.alignment > 4 * sum(p.numel() for p in module.teacher.network.parameters())
    assert "alignment" in aligned.plan
    assert "alignment" not in plain.plan


@pytest.mark.parametrize(
    ("training", "other", "sentence"),
    [
        ({"self_alignment": {"teacher_block": 5}}, {}, "teacher_block is 5, but the network has 4 blocks"),
        ({"feature_alignment": {"block": 5}}, {}, "feature_alignment.block is 5, but the network has 4 blocks"),
        ({"feature_alignment": {"channels": 0}}, {}, "channels is 0"),
        ({"self_alignment": {"ema_decay": 0.8}}, {}, "does not keep"),
        ({"ema_decays": [0.0]}, {}, "does not keep"),
        ({"bypass_share": 0.5, "bypass_first": 1, "bypass_last": 1}, {}, "feature_alignment.block is 2, which tokens bypass"),
        ({}, {"data": DataConfig(horizontal_flip=True)}, "no mirrored features"),
        ({}, {"task": "depth", "diffusion": "last"}, 'timesteps is "last"'),
    ],
)
def test_what_makes_no_sense_is_refused(training: dict[str, Any], other: dict[str, Any], sentence: str) -> None:
    parts = {"self_alignment": OWN, "feature_alignment": FEATURES}
    fields = {n: dataclasses.replace(parts[n], **v) if isinstance(v, dict) else v for n, v in training.items()}
    if other.get("diffusion"):
        other = {**other, "diffusion": DiffusionConfig(timesteps="last", prediction_type="sample", vlb_weight=0.0)}
        other["model"] = dataclasses.replace(MODEL, num_conditions=1)
    made = DptConfig(**{"model": MODEL, **other}, training=TrainingConfig(**{"ema_decays": [0.9]} | parts | fields))
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_recipe(Recipe(deepspeed={"train_batch_size": 8}, dpt=made), 1)


def test_single_fields_are_checked_and_set_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    for made in (
        lambda: SelfAlignmentConfig(weight=-1.0),
        lambda: SelfAlignmentConfig(student_block=3, teacher_block=3),
        lambda: SelfAlignmentConfig(offset_low=0.3),
        lambda: FeatureAlignmentConfig(weight=-1.0),
        lambda: FeatureAlignmentConfig(block=0),
        lambda: FeatureAlignmentConfig(channels=-1),
    ):
        with pytest.raises(UserError, match=r"dpt\.training"):
            made()
    arguments = ["--self_alignment.weight", "0.2", "--training.feature_alignment.channels", "3", "--steps", "5"]
    training = parse_command("pretrain", "", "training", arguments).dpt.training
    assert (training.self_alignment.weight, training.feature_alignment.channels, training.steps) == (0.2, 3, 5)
    with pytest.raises(SystemExit):
        parse_command("pretrain", "", "training", ["--help"])
    assert "--training.self_alignment.teacher_block" in capsys.readouterr().out


def test_memory_of_a_step_is_within_15_percent_of_the_measured_peak() -> None:
    large = config({"activation_checkpointing": False}, hidden_size=96, num_heads=6, input_size=16)
    large = dataclasses.replace(
        large,
        training=dataclasses.replace(large.training, feature_alignment=dataclasses.replace(FEATURES, projector_width=512)),
    )
    module, _ = module_and_inputs(large)
    assert module.teacher is not None
    assert module.teacher.network is not None
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    moments, features = torch.randn(6, 2, 4, 16, 16).half(), torch.randn(6, 3, 8, 8).half()
    sample = {"label": torch.arange(6), "latents": moments, "features": features, "sample_index": torch.arange(6)}
    inputs = preparation(large)({**sample, "key": [""] * 6})
    held = [*module.parameters(), *(p.grad for p in module.parameters())]
    existing = [*held, *module.teacher.network.state_dict().values(), *(value for value in inputs if value is not None)]
    with LiveBytes(existing) as live:
        module(*inputs).total.backward()
    teacher = 4 * sum(p.numel() for p in module.teacher.network.parameters())
    added = alignment_bytes(large.training, large.model, micro_batch_size=6, size=4) - teacher
    plan = memory(large.model, micro_batch_size=6, precision="fp32")
    assert plan.activations + added == pytest.approx(live.peak, rel=0.15)
    assert added > 0.2 * plan.activations
