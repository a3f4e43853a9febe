"""Noise schedules and the timesteps that a sampler visits: float64 tables of a few thousand numbers."""

import math

import numpy as np
from torch import Tensor

from dpt.config.sections import DiffusionConfig
from dpt.errors import UserError


def betas(config: DiffusionConfig) -> np.ndarray:
    """Variances beta_t of the forward steps, float64 `[T]`.

    linear: Ho et al. 2020; scaled_linear: Rombach et al. 2022 (linear in sqrt(beta)); squaredcos_cap_v2: Nichol & Dhariwal
    2021, eq. 17, capped at 0.999. With rescale_betas_zero_snr the last beta is 1 (Lin et al. 2024, algorithm 1).
    """
    steps = config.num_train_timesteps
    if config.beta_schedule == "linear":
        result = np.linspace(config.beta_start, config.beta_end, steps)
    elif config.beta_schedule == "scaled_linear":
        result = np.linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), steps) ** 2
    else:
        alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        result = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return _zero_terminal_snr(result) if config.rescale_betas_zero_snr else result


def _zero_terminal_snr(beta: np.ndarray) -> np.ndarray:
    """Betas whose alpha_t are shifted to 0 at the last timestep and rescaled to their original value at the first."""
    alpha = np.sqrt(np.cumprod(1.0 - beta))
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return 1.0 - np.concatenate((alpha[:1] ** 2, (alpha[1:] / alpha[:-1]) ** 2))


def alphas_cumprod(config: DiffusionConfig) -> np.ndarray:
    """Share of signal power alpha_bar_t = prod(1 - beta) after t + 1 steps, float64 `[T]`."""
    return np.cumprod(1.0 - betas(config))


def signal_and_noise(config: DiffusionConfig) -> tuple[np.ndarray, np.ndarray]:
    """(alpha_t, sigma_t) of noisy_t = alpha_t clean + sigma_t noise, float64 `[T]` each.

    Variance preserving: sqrt(alpha_bar), sqrt(1 - alpha_bar). Rectified flow (Liu et al. 2023): 1 - s, s with s = (t + 1) / T.
    A one-step network's last timestep is pure noise, (0, 1), whatever the schedule: nothing of the truth is left at test time.
    """
    if config.prediction_type == "rectified_flow":
        sigma = np.arange(1, config.num_train_timesteps + 1) / config.num_train_timesteps
        return 1.0 - sigma, sigma
    cumprod = alphas_cumprod(config)
    if config.one_step:
        cumprod[-1] = 0.0
    return np.sqrt(cumprod), np.sqrt(1.0 - cumprod)


def network_time(config: DiffusionConfig, timesteps: Tensor) -> Tensor:
    """The network's time input for `timesteps` `[B]` (0..T-1, whole or not): themselves, or float32 `[B]`, by convention."""
    if config.time_convention == "index":
        return timesteps
    if config.time_convention == "scaled_fraction":
        return timesteps.float() + 1.0
    return ((timesteps.double() + 1.0) / config.num_train_timesteps).float()


def inference_timesteps(
    num_inference_steps: int,
    num_train_timesteps: int,
    *,
    spacing: str,
    offset: int = 0,
    power: float = 1.0,
    extra_point: bool = False,
    continuous: bool = False,
) -> np.ndarray:
    """Timesteps that a sampler visits, int64 (float64 if `continuous`), strictly decreasing (Lin et al. 2024, table 2).

    spacing: "leading" (multiples of T // n, up to one stride below T, plus `offset`), "trailing" (from T - 1 down), "linspace"
    (T - 1 to 0). power: above 1 moves steps to low noise, below 1 to high noise: t -> (T - 1) (t / (T - 1))^power.
    extra_point: leave the last of n + 1 points to the end of the path, as multistep solvers do (leading, linspace).
    continuous: skip rounding to whole timesteps. UserError if there are more steps than timesteps, or an offset leads
    beyond the last one.
    """
    steps, total = num_inference_steps, num_train_timesteps
    points = steps + 1 if extra_point else steps
    timesteps: np.ndarray
    if not 1 <= steps <= total - int(extra_point and spacing != "trailing"):
        raise UserError(
            f"dpt.evaluation.steps {steps} is out of range for {total} training timesteps; take between 1 and that."
        )
    whole = np.asarray if continuous else np.round
    if spacing == "linspace":
        timesteps = whole(np.linspace(0, total - 1, points))[::-1][:steps]
    elif spacing == "leading":
        timesteps = (np.arange(points) * (total // points))[::-1][:steps] + offset
        if timesteps[0] >= total:
            raise UserError(
                f"dpt.diffusion.steps_offset {offset} moves the first of {steps} steps beyond the last timestep, {total - 1}; "
                "take fewer steps."
            )
    elif spacing == "trailing":
        timesteps = whole(total - np.arange(steps) * (total / steps)) - 1
    else:
        raise UserError(f"dpt.evaluation.timestep_spacing {spacing!r} is unknown; choose leading, trailing or linspace.")
    if power != 1.0:
        timesteps = whole((total - 1) * (timesteps / (total - 1)) ** power)
    if continuous:
        return np.asarray(timesteps, dtype=np.float64)
    if power != 1.0:
        ascending, index = timesteps[::-1], np.arange(steps)
        ascending = np.maximum.accumulate(ascending - index) + index  # no timestep twice
        timesteps = np.minimum(ascending, total - steps + index)[::-1]
    return timesteps.astype(np.int64)
