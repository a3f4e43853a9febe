"""AdamW with averages equals torch's AdamW and a hand-kept average; the learning rate follows its schedule."""

import pytest
import torch

from dpt.config.sections import TrainingConfig
from dpt.errors import UserError
from dpt.training.optimizer import DEFAULTS, AdamWEMA, learning_rate, optimizer_options


def _train(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    history = [parameter.detach().clone()]
    for _ in range(steps):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        if isinstance(optimizer, AdamWEMA):
            optimizer.updates += 1
        history.append(parameter.detach().clone())
    return history


@pytest.mark.parametrize("warmup", [False, True])
def test_updates_are_adamw_and_averages_are_exponential(warmup: bool) -> None:
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    start = torch.randn(40, generator=torch.Generator().manual_seed(1))
    plain, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    reference = _train(torch.optim.AdamW([plain], **options, foreach=False), plain, 20)
    optimizer = AdamWEMA([ours], options, ema_decays=[0.9, 0.0, 0.5], ema_warmup=warmup)
    history = _train(optimizer, ours, 20)
    torch.testing.assert_close(torch.stack(history), torch.stack(reference), rtol=1e-6, atol=1e-7)
    assert optimizer.state_names() == ["exp_avg", "exp_avg_sq", "ema0", "ema2"]
    for name, decay in (("ema0", 0.9), ("ema2", 0.5)):
        average = history[0].double()
        for number, weights in enumerate(history[1:], 1):
            d = min(decay, (1 + number) / (10 + number)) if warmup else decay
            average = d * average + (1 - d) * weights.double()
        torch.testing.assert_close(optimizer.state[ours][name].double(), average, rtol=1e-5, atol=1e-6)


def test_parameters_without_gradients_are_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamWEMA([parameter], DEFAULTS, ema_decays=[0.9])
    optimizer.step()
    assert not optimizer.state
    assert torch.equal(parameter, torch.ones(3))


def test_options_of_deepspeeds_block() -> None:
    assert optimizer_options({}) == DEFAULTS
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], betas=optimizer_options({"params": {"betas": [0, 0.9]}})["betas"])
    block = {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.5, 0.6], "torch_adam": True}}
    assert optimizer_options(block) == DEFAULTS | {"lr": 0.1, "betas": (0.5, 0.6)}
    with pytest.raises(UserError, match=r"optimizer\.params\.beta is unknown"):
        optimizer_options({"params": {"beta": 0.9}})


def test_learning_rates() -> None:
    constant = TrainingConfig(steps=100, warmup_steps=10)
    assert [learning_rate(constant, 1.0, s) for s in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    falling = TrainingConfig(steps=101, lr_schedule="exponential", lr_final=1e-2)
    assert [learning_rate(falling, 1.0, s) for s in (0, 50, 100)] == pytest.approx([1.0, 0.1, 0.01])
    cosine = TrainingConfig(steps=111, warmup_steps=10, lr_schedule="cosine", lr_final=0.5)
    assert [learning_rate(cosine, 1.5, s) for s in (10, 60, 110)] == pytest.approx([1.5, 1.0, 0.5])
