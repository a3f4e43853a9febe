"""Samplers: DDIM, DDPM and DPM-Solver++ (2M), each as a table of coefficients computed once in float64.

Every step of these solvers is linear: next = c_noisy noisy + c_clean clean + c_previous previous_clean + std noise, where
clean is the prediction turned into clean latents. So one loop runs them all, on variance-preserving paths and on straight
ones (rectified flow, where DDIM with eta 0 is Euler's method).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpt.config.sections import DiffusionConfig
from dpt.diffusion import noise as noises
from dpt.diffusion.schedules import inference_timesteps, network_time, signal_and_noise
from dpt.errors import UserError

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents `[B, C, h, w]`, the network's time input `[B]`) -> prediction `[B, C or 2 C, h, w]`."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A sampler's step, from noise level (alpha, sigma) at `timestep` to the next."""

    timestep: float
    """Timestep in 0..T-1; a whole number except on straight paths of continuous time."""
    alpha: float
    sigma: float
    c_noisy: float
    c_clean: float
    c_previous: float = 0.0
    std: float = 0.0
    log_variance_range: tuple[float, float] | None = None
    """Bounds between which a learned variance interpolates (DDPM)."""
    guided: bool = True
    """Whether guidance, if any, acts at this step."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sampler's steps; `sample` runs it."""

    diffusion: DiffusionConfig
    steps: tuple[Step, ...]


def make_plan(
    diffusion: DiffusionConfig,
    *,
    num_inference_steps: int,
    sampler: str = "ddim",
    eta: float = 0.0,
    timestep_spacing: str = "",
    step_power: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> Plan:
    """The steps of a sampler; fields as in `EvaluationConfig`. UserError for what cannot be sampled.

    With step_power 1, timesteps and steps are those of diffusers' schedulers, whose DDIM steps by T // n for any spacing.
    guidance_interval: noise levels t / T at which guidance acts, ends included (Kynkaanniemi et al. 2024, eq. 4 and 5).
    Rectified flow whose network takes a fraction of the path as its time uses fractional timesteps where they fall.
    """
    if sampler not in ("ddim", "ddpm", "dpmsolver++"):
        raise UserError(f"dpt.evaluation.sampler {sampler!r} is unknown; choose ddim, ddpm or dpmsolver++.")
    straight = diffusion.prediction_type == "rectified_flow"
    if straight and (sampler == "ddpm" or eta > 0):
        raise UserError(
            "rectified flow has no stochastic sampler here; set dpt.evaluation.sampler to ddim (Euler) and eta to 0."
        )
    if eta > 0 and sampler != "ddim":
        raise UserError(f"dpt.evaluation.eta is {eta}, which is DDIM's alone; set it to 0, or dpt.evaluation.sampler to ddim.")
    if diffusion.one_step:
        if num_inference_steps != 1:
            raise UserError(f"these weights predict in one step; dpt.evaluation.steps is {num_inference_steps}: set it to 1.")
        last = Step(timestep=diffusion.num_train_timesteps - 1, alpha=0.0, sigma=1.0, c_noisy=0.0, c_clean=1.0)
        return Plan(diffusion=diffusion, steps=(last,))
    total = diffusion.num_train_timesteps
    multistep = sampler == "dpmsolver++"
    timesteps = inference_timesteps(
        num_inference_steps,
        total,
        spacing=timestep_spacing or diffusion.timestep_spacing,
        offset=diffusion.steps_offset,
        power=step_power,
        extra_point=multistep,
        continuous=straight and diffusion.time_convention != "index",
    ).tolist()
    following = [*timesteps[1:], -1]
    end = (1.0, 0.0)
    alpha, sigma = signal_and_noise(diffusion)
    if sampler == "ddim" and step_power == 1.0 and not straight:
        following = [t - total // num_inference_steps for t in timesteps]
        end = end if diffusion.set_alpha_to_one else (float(alpha[0]), float(sigma[0]))

    def level(timestep: float) -> tuple[float, float]:
        if timestep < 0:
            return end
        if straight:
            return 1.0 - (timestep + 1.0) / total, (timestep + 1.0) / total
        return float(alpha[int(timestep)]), float(sigma[int(timestep)])

    levels = [(*level(t), *level(n)) for t, n in zip(timesteps, following, strict=True)]
    if diffusion.prediction_type == "epsilon" and any(alpha == 0.0 for alpha, *_ in levels):
        raise UserError(
            "epsilon prediction cannot start from pure noise (alpha 0); train with v_prediction or sample, or take "
            "dpt.evaluation.timestep_spacing leading."
        )
    if multistep:
        coefficients = [_dpm_solver(levels, number) for number in range(len(levels))]
    elif sampler == "ddpm":
        coefficients = [_ddpm(*level) for level in levels]
    else:
        coefficients = [_ddim(*level, eta=eta) for level in levels]
    low, high = guidance_interval
    steps = (
        Step(timestep=t, alpha=alpha, sigma=sigma, guided=low <= t / total <= high, **numbers)
        for t, (alpha, sigma, *_), numbers in zip(timesteps, levels, coefficients, strict=True)
    )
    return Plan(diffusion=diffusion, steps=tuple(steps))


def _ddim(alpha: float, sigma: float, next_alpha: float, next_sigma: float, *, eta: float) -> dict[str, Any]:
    """Song et al. 2021 (DDIM), eq. 12 and 16."""
    std = 0.0
    if eta > 0:
        std = eta * (next_sigma / sigma) * math.sqrt(max(0.0, 1.0 - (alpha / next_alpha) ** 2))
    direction = math.sqrt(max(0.0, next_sigma**2 - std**2)) / sigma
    return {"c_noisy": direction, "c_clean": next_alpha - direction * alpha, "std": std}


def _ddpm(alpha: float, sigma: float, next_alpha: float, next_sigma: float) -> dict[str, Any]:
    """Ho et al. 2020, eq. 7; a learned variance between posterior variance and beta: Nichol & Dhariwal 2021, eq. 15."""
    beta = 1.0 - (alpha / next_alpha) ** 2
    variance = (next_sigma / sigma) ** 2 * beta
    return {
        "c_noisy": alpha / next_alpha * (next_sigma / sigma) ** 2,
        "c_clean": next_alpha * beta / sigma**2,
        "std": math.sqrt(variance),
        "log_variance_range": (math.log(max(variance, 1e-20)), math.log(beta)) if next_sigma > 0 else None,
    }


def _dpm_solver(levels: list[tuple[float, float, float, float]], number: int) -> dict[str, Any]:
    """DPM-Solver++ 2M, midpoint (Lu et al. 2022, algorithm 2); first order at the first and last step."""
    alpha, sigma, next_alpha, next_sigma = levels[number]
    gain = next_alpha - alpha * next_sigma / sigma  # next_alpha (1 - exp(-h)), h the step in log(alpha / sigma)
    extrapolation = 0.0
    if 0 < number < len(levels) - 1 and levels[number - 1][0] > 0:
        last_step, this_step = (math.log(a2 / s2) - math.log(a1 / s1) for a1, s1, a2, s2 in levels[number - 1 : number + 1])
        extrapolation = this_step / last_step / 2.0
    return {"c_noisy": next_sigma / sigma, "c_clean": gain * (1.0 + extrapolation), "c_previous": -gain * extrapolation}


def clean_latents(
    prediction: Tensor, noisy: Tensor, alpha: Tensor | float, sigma: Tensor | float, prediction_type: str
) -> Tensor:
    """The clean latents implied by a prediction; noisy = alpha clean + sigma noise.

    v = alpha noise - sigma clean (Salimans & Ho 2022); rectified flow: velocity = noise - clean.
    """
    if prediction_type == "epsilon":
        return (noisy - sigma * prediction) / alpha
    if prediction_type == "sample":
        return prediction
    if prediction_type == "v_prediction":
        return alpha * noisy - sigma * prediction
    if prediction_type == "rectified_flow":
        return noisy - sigma * prediction
    raise UserError(f"prediction_type {prediction_type!r} is unknown to dpt; these weights cannot be sampled.")


@torch.no_grad()
def sample(
    denoise: Denoise, noise: Tensor, plan: Plan, *, seeds: Tensor | None = None, unguided: Denoise | None = None
) -> Tensor:
    """Sample clean latents float32 `[B, C, h, w]` from `noise` `[B, C, h, w]` (standard normal).

    `seeds` int64 `[B]`: for each sample's further noise in stochastic samplers, so that results do not depend on the batch.
    `unguided`: replaces `denoise` at steps outside the plan's guidance interval.
    """
    noisy, previous = noise.float(), None
    channels = noise.shape[1]
    for number, step in enumerate(plan.steps):
        timesteps = torch.full((len(noisy),), step.timestep, device=noisy.device)
        times = network_time(plan.diffusion, timesteps)
        predict = denoise if step.guided or unguided is None else unguided
        prediction = predict(noisy, times).float()
        assert prediction.shape[1] in (channels, 2 * channels), f"{prediction.shape[1]} channels predicted for {channels}"
        clean = clean_latents(prediction[:, :channels], noisy, step.alpha, step.sigma, plan.diffusion.prediction_type)
        noisy = step.c_noisy * noisy + step.c_clean * clean
        if step.c_previous != 0.0:
            assert previous is not None
            noisy = noisy + step.c_previous * previous
        if step.std > 0.0:
            assert seeds is not None, "a stochastic sampler needs seeds"
            fresh = noises.normal(noises.derive(seeds.to(noisy.device), number), noisy.shape[1:])
            noisy = noisy + _deviation(step, prediction[:, channels:]) * fresh
        previous = clean
    return noisy


def _deviation(step: Step, variance: Tensor) -> Tensor | float:
    """Standard deviation of the step's noise: learned where the network predicts it and the sampler uses it (DDPM)."""
    if not variance.shape[1] or step.log_variance_range is None:
        return step.std
    low, high = step.log_variance_range
    share = (variance + 1.0) / 2.0
    return torch.exp(0.5 * (share * high + (1.0 - share) * low))


def guide(predict: Denoise, *, scale: float, channels: int, guided_channels: int = 0) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022) around `predict`, which gets batches of 2 B: conditional half first.

    channels: C of the latents. guided_channels: number of first channels to guide; 0: all C. Public DiT guides 3 of 4, an
    accident: 1.5 on 3 channels acts about like 1.375 on 4. A variance output stays the conditional one.
    """
    guided = guided_channels or channels

    def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        prediction = predict(torch.cat((noisy, noisy)), torch.cat((timesteps, timesteps)))
        conditional, unconditional = prediction.chunk(2)
        mixed = unconditional[:, :guided] + scale * (conditional[:, :guided] - unconditional[:, :guided])
        return torch.cat((mixed, conditional[:, guided:]), dim=1)

    return denoise
