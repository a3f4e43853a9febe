"""The training objective: noising, targets, and the loss with its learned-variance bound."""

import math

import numpy as np
import torch
from torch import Tensor

from dpt.config.sections import DiffusionConfig
from dpt.diffusion.samplers import clean_latents
from dpt.diffusion.schedules import betas, network_time, signal_and_noise
from dpt.errors import UserError


class DiffusionObjective:
    """The forward process and the loss of a `DiffusionConfig`. Holds only small tables; works on the inputs' device."""

    def __init__(self, config: DiffusionConfig) -> None:
        if config.prediction_type == "rectified_flow" and config.min_snr_gamma > 0:
            raise UserError("dpt.diffusion.min_snr_gamma does not apply to rectified_flow; set it to 0.")
        if config.prediction_type == "epsilon" and config.rescale_betas_zero_snr:
            raise UserError(
                "dpt.diffusion.rescale_betas_zero_snr does not go with epsilon, which says nothing of pure noise; "
                "set prediction_type to v_prediction or sample."
            )
        self.config = config
        self._tables = {name: torch.from_numpy(t).float() for name, t in _tables(config).items()}

    def _at(self, name: str, timesteps: Tensor) -> Tensor:
        """Table entries `[B, 1, 1, 1]` at timesteps int64 `[B]`."""
        table = self._tables[name]
        if table.device != timesteps.device:
            table = self._tables[name] = table.to(timesteps.device)
        return table[timesteps][:, None, None, None]

    def noise_strength(self, timesteps: Tensor) -> Tensor | float:
        """Multi-resolution strength of the noise: `[B]` if annealed by t / T, a number if not; 0 is white noise."""
        strength = self.config.multires_noise_strength
        if strength > 0 and self.config.multires_noise_annealed:
            return strength * timesteps / self.config.num_train_timesteps
        return strength

    def network_time(self, timesteps: Tensor) -> Tensor:
        """The network's time input for timesteps int64 `[B]` (`dpt.diffusion.schedules.network_time`)."""
        return network_time(self.config, timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents `[B, C, h, w]` = alpha_t latents + sigma_t noise, at timesteps int64 `[B]`."""
        return self._at("alpha", timesteps) * latents + self._at("sigma", timesteps) * noise

    def clean(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents float32 `[B, C, h, w]` implied by a prediction `[B, C or 2 C, h, w]`."""
        mean = prediction[:, : noisy_latents.shape[1]].float()
        alpha, sigma = self._at("alpha", timesteps), self._at("sigma", timesteps)
        return clean_latents(mean, noisy_latents, alpha, sigma, self.config.prediction_type)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The network's regression target `[B, C, h, w]`."""
        kind = self.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return latents
        if kind == "rectified_flow":
            return noise - latents
        return self._at("alpha", timesteps) * noise - self._at("sigma", timesteps) * latents

    def loss(
        self,
        prediction: Tensor,
        latents: Tensor,
        noise: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        valid: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Batch means (scalars): "loss" = "mse" (or with `loss` "l1" the mean absolute error) + vlb_weight "vlb"; "mse" and
        "vlb", the latter only if it is trained.

        prediction `[B, C or 2 C, h, w]`, with 2 C the variance output is the second half; valid: `[B, h, w]`, 1 where the loss
        counts. A sample's loss is the mean over its valid latents (0 without any), so that splits of the batch do not matter.
        "vlb" is one term of the variational bound in bits per dimension, of the learned variance only: the mean is detached
        (Nichol & Dhariwal 2021, L_hybrid with the weight of DiT, 1; their own, L_vlb / 1000, is this times T / 1000).
        """
        channels = latents.shape[1]
        prediction = prediction.float()
        mean, variance = prediction[:, :channels], prediction[:, channels:]
        target = self.target(latents.float(), noise.float(), timesteps)
        squared = (mean - target).square()
        weights = self._at("min_snr", timesteps) if self.config.min_snr_gamma > 0 else 1.0
        losses = {"mse": _masked_mean(weights * squared, valid)}
        error = losses["mse"] if self.config.loss == "mse" else _masked_mean(weights * (mean - target).abs(), valid)
        losses["loss"] = error
        if variance.shape[1] and self.config.vlb_weight > 0 and self.config.prediction_type != "rectified_flow":
            bound = self._variance_bound(mean.detach(), variance, latents.float(), noisy_latents.float(), timesteps)
            losses["vlb"] = _masked_mean(bound, valid)
            losses["loss"] = error + self.config.vlb_weight * losses["vlb"]
        elif variance.shape[1]:
            losses["loss"] = losses["loss"] + 0.0 * variance.sum()  # unused weights still get (zero) gradients, as ZeRO needs
        return losses

    def _variance_bound(self, mean: Tensor, variance: Tensor, latents: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """A term of the variational bound in bits per latent `[B, C, h, w]` (Nichol & Dhariwal 2021, eq. 4-6 and 15).

        KL between the forward posterior and N(predicted mean, exp(log variance)); at t = 0 the negative log-likelihood of
        the clean latents under it, discretised to 1 / 255 (made for pixels; kept for latents, as in DiT).
        """
        kind = self.config.prediction_type
        clean = clean_latents(mean, noisy, self._at("alpha", timesteps), self._at("sigma", timesteps), kind)
        c_clean, c_noisy = self._at("posterior_clean", timesteps), self._at("posterior_noisy", timesteps)
        min_log, max_log = self._at("posterior_log_variance", timesteps), self._at("log_beta", timesteps)
        share = (variance + 1.0) / 2.0
        log_variance = share * max_log + (1.0 - share) * min_log
        predicted_mean = c_clean * clean + c_noisy * noisy
        true_mean = c_clean * latents + c_noisy * noisy
        kl = 0.5 * (
            log_variance
            - min_log
            - 1.0
            + torch.exp(min_log - log_variance)
            + (true_mean - predicted_mean).square() * torch.exp(-log_variance)
        )
        nll = -_discretised_log_likelihood(latents, predicted_mean, 0.5 * log_variance)
        return torch.where(timesteps[:, None, None, None] == 0, nll, kl) / math.log(2.0)


def _tables(config: DiffusionConfig) -> dict[str, np.ndarray]:
    """float64 `[T]` tables; the posterior's are those of Ho et al. 2020, eq. 7."""
    alpha, sigma = signal_and_noise(config)
    tables = {"alpha": alpha, "sigma": sigma}
    if config.prediction_type == "rectified_flow":
        return tables
    beta = betas(config)
    previous = np.concatenate(([1.0], alpha[:-1] ** 2))
    posterior_variance = beta * (1.0 - previous) / sigma**2
    posterior_variance[0] = posterior_variance[1]  # 0 there, but its logarithm is needed
    tables["log_beta"] = np.log(beta)
    tables["posterior_log_variance"] = np.log(posterior_variance)
    tables["posterior_clean"] = beta * np.sqrt(previous) / sigma**2
    tables["posterior_noisy"] = (1.0 - previous) * np.sqrt(1.0 - beta) / sigma**2
    snr = (alpha / sigma) ** 2
    clipped = np.minimum(snr, config.min_snr_gamma)
    # Hang et al. 2023: min(SNR, gamma) on the clean latents' error, divided by that error's share in the one trained on.
    error_share = {"epsilon": snr, "sample": np.ones_like(snr), "v_prediction": snr + 1.0}[config.prediction_type]
    with np.errstate(invalid="ignore"):  # 0 / 0 at zero terminal SNR: epsilon is not trained there
        tables["min_snr"] = clipped / error_share
    return tables


def _masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over samples of each sample's mean over its valid latents. values `[B, C, h, w]`, valid `[B, h, w]`."""
    if valid is None:
        return values.mean()
    weights = valid[:, None].to(values.dtype)
    count = weights.flatten(1).sum(1) * values.shape[1]
    return ((values * weights).flatten(1).sum(1) / count.clamp(min=1.0)).mean()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal distribution function that DiT and Improved DDPM use."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of x in bins of 2 / 255 under N(mean, exp(log_scale)); the outer bins are open (Ho et al. 2020, eq. 13)."""
    centred, inverse = x - mean, torch.exp(-log_scale)
    upper = _normal_cdf(inverse * (centred + 1.0 / 255.0))
    lower = _normal_cdf(inverse * (centred - 1.0 / 255.0))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return torch.log(probability.clamp(min=1e-12))
