"""Walks of diffusers' schedulers, in double precision, and what to compare with them."""

import torch

from dpt.config.sections import DiffusionConfig
from dpt.diffusion import schedules

SHAPE = (2, 4, 6, 5)


def network(channels: int = 4):
    """A fixed smooth function of the noisy latents and the timestep."""
    weight = torch.randn(channels, 4, generator=torch.Generator().manual_seed(5)) / 2

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        phase = t.to(x.dtype)[:, None, None, None] / 1000
        return torch.tanh(torch.einsum("oc,bchw->bohw", weight.to(x.dtype), x)) + 0.3 * torch.sin(5 * phase)

    return predict


def start() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def walk(scheduler, config: DiffusionConfig, steps: int, predict) -> torch.Tensor:
    """diffusers' trajectory with tables in double precision too: its own are single, which 1 / alpha multiplies by up to 2e4;
    test_schedules compares the two."""
    scheduler.alphas_cumprod = torch.from_numpy(schedules.alphas_cumprod(config))
    if "set_alpha_to_one" in scheduler.config and not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    x = start().double()
    for t in scheduler.timesteps[:steps]:
        x = scheduler.step(predict(x, t.expand(len(x))), t, x, return_dict=False)[0]
    return x


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.double() - theirs).abs().max().item() <= 1e-5 * max(1.0, theirs.abs().max().item())
