"""Evaluations, and validation during training."""

from dataclasses import dataclass, field, replace
from typing import Literal

from dpt.config.numbers import AT_LEAST_1, ENSEMBLE_SIZES, NOT_NEGATIVE, POSITIVE, SAMPLER_STEPS, SHARE
from dpt.config.sections.checking import check, check_fields, check_guidance
from dpt.config.sections.diffusion import DiffusionConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The evaluator's predictions and scores. Lists are swept over."""

    weights: str = ""
    """Weights to evaluate: an exported folder, a checkpoint (or a run's folder: its newest), public weights, or
    hub:owner/name[@revision]."""
    use_ema: bool = True
    """Evaluate the averaged weights rather than the plain ones."""
    data: list[str] = field(default_factory=list)
    """Evaluation shard folders or URLs (dpt.data.cache_dir keeps what is fetched)."""
    protocol: str = ""
    """Scoring protocol; empty: that of each folder's dataset."""
    steps: list[int] = field(default_factory=lambda: [50])
    """Sampler steps."""
    ensemble: list[int] = field(default_factory=lambda: [1])
    """Ensemble sizes."""
    aggregation: Literal["median", "mean", "compile"] = "compile"
    """How members are merged: pixelwise, or by the median after affine alignment (compile; depth only)."""
    sampler: Literal["ddim", "ddpm", "dpmsolver++"] = "ddim"
    """Sampling method."""
    eta: float = 0.0
    """DDIM's stochasticity, 0 to 1."""
    schedule: Literal["", "linear", "scaled_linear", "squaredcos_cap_v2"] = ""
    """Noise schedule at test time, with its usual betas; empty: that of training."""
    timestep_spacing: Literal["", "leading", "trailing", "linspace"] = ""
    """Spacing of the sampler's timesteps; empty: that of the weights (dpt.diffusion.timestep_spacing)."""
    step_power: float = 1.0
    """Distribution of steps; above 1: more at low noise; below 1: more at high noise."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1: none."""
    guidance_low: float = 0.0
    """Lowest noise level, as a share of the timesteps, at which guidance acts."""
    guidance_high: float = 1.0
    """Highest noise level, as a share of the timesteps, at which guidance acts; steps outside the two cost one pass."""
    batch_size: int = 16
    """Predictions (samples x members) that a rank computes at once."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Number format of the network's products (tf32: float32 rounded to 10 bits, on GPUs only); the sampler works in fp32."""
    max_samples: int = 0
    """Score only the first samples; 0: all."""
    seed: int = 0
    """Seed of the initial noise."""
    pictures: int = 4
    """Number of pictures each of best, median and worst samples, and of samples that are the same for every model; 0: none."""
    predictions: str = ""
    """Folder of another system's predictions to score instead."""
    save_predictions: bool = False
    """Keep every prediction as a file."""
    output_dir: str = "runs/evaluate"
    """Folder of results."""

    def __post_init__(self) -> None:
        for name, allowed in (("steps", SAMPLER_STEPS), ("ensemble", ENSEMBLE_SIZES)):
            values = getattr(self, name)
            check(
                len(values) > 0 and all(value in allowed for value in values),
                f"dpt.evaluation.{name} {values}: each must be {allowed}.",
            )
        check_guidance(self, "dpt.evaluation")
        check_fields(self, "dpt.evaluation", SHARE, "eta")
        check_fields(self, "dpt.evaluation", POSITIVE, "step_power")
        check_fields(self, "dpt.evaluation", AT_LEAST_1, "batch_size")
        check_fields(self, "dpt.evaluation", NOT_NEGATIVE, "max_samples", "pictures")

    def settled(self, diffusion: DiffusionConfig) -> "EvaluationConfig":
        """These settings adapted to weights trained for `diffusion`: a one-step network takes one step, whatever is
        requested, and one ensemble member if it always starts from the same noise."""
        if not diffusion.one_step:
            return self
        return replace(self, steps=[1], ensemble=self.ensemble if diffusion.initial_noise == "random" else [1])


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Scores of evaluation sets during training, and what depends on them (perception only)."""

    every: int = 0
    """Steps between validations; 0: none. The last step is always validated."""
    data: list[str] = field(default_factory=list)
    """Evaluation shard folders; empty: those of dpt.evaluation.data."""
    max_samples: int = 64
    """Score only the first samples of each set; 0: all."""
    steps: int = 10
    """Sampler steps; other sampling settings are those of dpt.evaluation."""
    ensemble: int = 1
    """Ensemble size."""
    metric: str = ""
    """Metric of the best weights, e.g. depth/abs_rel or depth/hypersim_val/delta1; empty: the first set's main metric."""
    keep_best: bool = True
    """Export the averaged weights with the best validation to OUTPUT_DIR/best."""
    patience: int = 0
    """End training after this many validations in a row without improvement; 0: never."""

    def __post_init__(self) -> None:
        check_fields(self, "dpt.validation", NOT_NEGATIVE, "every", "max_samples", "patience")
        check_fields(self, "dpt.validation", SAMPLER_STEPS, "steps")
        check_fields(self, "dpt.validation", ENSEMBLE_SIZES, "ensemble")
