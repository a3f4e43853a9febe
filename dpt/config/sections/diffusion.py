"""The diffusion process, the pixel loss, and pictures during training."""

from dataclasses import dataclass, field, replace
from typing import Literal

from dpt.config.numbers import NOT_NEGATIVE, POSITIVE, SAMPLER_STEPS, Range
from dpt.config.sections.checking import check, check_fields, check_guidance


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The forward process and the training objective."""

    num_train_timesteps: int = 1000
    """Timesteps of the forward process."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """Noise schedule (diffusers' names)."""
    beta_start: float = 1e-4
    """First beta of the linear schedules."""
    beta_end: float = 2e-2
    """Last beta of the linear schedules."""
    rescale_betas_zero_snr: bool = False
    """Rescale the betas so that the last timestep is pure noise (zero terminal SNR; not with epsilon)."""
    prediction_type: Literal["epsilon", "sample", "v_prediction", "rectified_flow"] = "epsilon"
    """Prediction target: the noise, the clean latents, v, or the velocity of a straight path."""
    time_convention: Literal["index", "fraction", "scaled_fraction"] = "index"
    """Timestep t in 0..T-1 as the network sees it: t, (t + 1) / T (DiT-MoE's rectified flow) or t + 1 (diffusers' flow)."""
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    """Spacing of a sampler's timesteps, unless dpt.evaluation.timestep_spacing sets another."""
    steps_offset: int = 0
    """Added to the timesteps of the spacing "leading" (Stable Diffusion: 1)."""
    set_alpha_to_one: bool = True
    """DDIM's last step ends at clean latents rather than at the noise level of timestep 0 (Stable Diffusion: false)."""
    loss: Literal["mse", "l1"] = "mse"
    """Error of a prediction: squared (the paper), or absolute, which blurs one-step predictions less."""
    vlb_weight: float = 1.0
    """Weight of the variational bound on the learned variance; 0: the variance output is ignored."""
    min_snr_gamma: float = 0.0
    """Min-SNR loss weighting; 0: off."""
    multires_noise_strength: float = 0.0
    """Strength of each coarser level of multi-resolution noise (Marigold: 0.9); 0: white noise."""
    multires_noise_annealed: bool = True
    """Scale the multi-resolution strength by t / T."""
    timesteps: Literal["uniform", "logit_normal", "last"] = "uniform"
    """Distribution of training timesteps: uniform, mostly middle ones, or only the last, for prediction in one step."""
    timestep_location: float = 0.0
    """Mean of logit(t / T) for "logit_normal"; positive: more noise."""
    timestep_scale: float = 1.0
    """Standard deviation of logit(t / T) for "logit_normal"."""
    initial_noise: Literal["random", "fixed", "zero"] = "random"
    """Input of a one-step network: fresh noise, the same noise for all samples, or zeros."""

    def __post_init__(self) -> None:
        check_fields(self, "dpt.diffusion", Range(least=2), "num_train_timesteps")
        check(
            0.0 < self.beta_start <= self.beta_end < 1.0,
            f"dpt.diffusion.beta_start {self.beta_start} and beta_end {self.beta_end} must obey 0 < start <= end < 1.",
        )
        check_fields(self, "dpt.diffusion", NOT_NEGATIVE, "vlb_weight", "min_snr_gamma", "multires_noise_strength")
        check_fields(self, "dpt.diffusion", POSITIVE, "timestep_scale")
        check(
            0 <= self.steps_offset < self.num_train_timesteps,
            f"dpt.diffusion.steps_offset is {self.steps_offset}; it must be from 0 to below num_train_timesteps.",
        )
        check(
            not (self.rescale_betas_zero_snr and self.prediction_type == "rectified_flow"),
            "dpt.diffusion.rescale_betas_zero_snr does not apply to rectified_flow, which has no betas; set it to false.",
        )
        self._check_one_step()

    def with_schedule(self, beta_schedule: str) -> "DiffusionConfig":
        """This objective with another noise schedule and its standard betas; unchanged for its own schedule.

        linear: 1e-4 to 2e-2 (Ho et al. 2020); scaled_linear: 8.5e-4 to 1.2e-2 (Stable Diffusion); squaredcos_cap_v2 has no
        range. UserError for rectified flow, which has no noise schedule.
        """
        check(
            self.prediction_type != "rectified_flow",
            f"rectified flow has no noise schedule to be replaced by {beta_schedule}; leave the schedule out.",
        )
        if beta_schedule == self.beta_schedule:
            return self
        start, end = (8.5e-4, 1.2e-2) if beta_schedule == "scaled_linear" else (1e-4, 2e-2)
        return replace(self, beta_schedule=beta_schedule, beta_start=start, beta_end=end)  # type: ignore[arg-type]

    def _check_one_step(self) -> None:
        if not self.one_step:
            check(
                self.initial_noise == "random",
                f'dpt.diffusion.initial_noise is "{self.initial_noise}"; that goes with timesteps "last" only.',
            )
            return
        check(
            self.prediction_type != "epsilon",
            'dpt.diffusion.timesteps is "last", where all that the network sees is noise, and prediction_type is "epsilon"; '
            "choose v_prediction or sample.",
        )
        for name in ("vlb_weight", "min_snr_gamma"):
            check(
                getattr(self, name) == 0,
                f'dpt.diffusion.{name} is {getattr(self, name)}; it has no meaning for timesteps "last": set it to 0.',
            )
        check(
            self.initial_noise == "random" or self.multires_noise_strength == 0,
            f"dpt.diffusion.multires_noise_strength is {self.multires_noise_strength}, but initial_noise is "
            f'"{self.initial_noise}"; set it to 0.',
        )

    @property
    def one_step(self) -> bool:
        """Whether the network predicts in one pass, from pure noise."""
        return self.timesteps == "last"


@dataclass(frozen=True, kw_only=True)
class PixelLossConfig:
    """A loss on decoded predictions besides that on latents, for one-step networks (diffusion.timesteps "last")."""

    weight: float = 0.0
    """Weight of the pixel loss; 0: off, and no decoder is held."""
    latent_weight: float = 1.0
    """Weight of the loss on latents."""
    depth: Literal["affine_l1", "affine_l2"] = "affine_l1"
    """Error of depth, after a least-squares scale and shift. (Flow: end-point error in pixels; masks: cross-entropy.)"""
    gradient_weight: float = 0.5
    """Weight of depth's multi-scale gradient error."""

    def __post_init__(self) -> None:
        check_fields(self, "dpt.pixel_loss", NOT_NEGATIVE, "weight", "latent_weight", "gradient_weight")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Pictures during training: class samples in pre-training, and the experts' routing."""

    every: int = 0
    """Steps between pictures; 0: only at the end."""
    labels: list[int] = field(default_factory=list)
    """Class ids to sample, one per picture; empty: the first eight."""
    num_inference_steps: int = 50
    """DDIM steps."""
    guidance_scale: float = 4.0
    """Classifier-free guidance; 1: none."""
    guidance_channels: int = 0
    """Latent channels that guidance acts on; 0: all (public DiT: 3 of 4)."""
    guidance_low: float = 0.0
    """Lowest noise level, as a share of the timesteps, at which guidance acts."""
    guidance_high: float = 1.0
    """Highest noise level, as a share of the timesteps, at which guidance acts."""

    def __post_init__(self) -> None:
        check_guidance(self, "dpt.sampling")
        check_fields(self, "dpt.sampling", NOT_NEGATIVE, "every", "guidance_channels")
        check_fields(self, "dpt.sampling", SAMPLER_STEPS, "num_inference_steps")
