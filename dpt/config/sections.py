"""The sections of a recipe's "dpt" object: typed, frozen, each field with its meaning, unit and default.

Validation of single fields is here (`__post_init__`); what concerns several sections is in `recipe.py`.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from dpt.config.alignment import FeatureAlignmentConfig, SelfAlignmentConfig
from dpt.config.numbers import NOT_NEGATIVE, Range
from dpt.errors import UserError

Task = Literal["class", "depth", "flow", "amodal", "generalist"]
CONDITIONS: dict[str, tuple[int, int]] = {
    "class": (0, 0),
    "depth": (1, 2),
    "flow": (2, 2),
    "amodal": (2, 2),
    "generalist": (2, 2),
}
"""Least and most condition latents (`model.num_conditions`) of each task; `dpt.tasks.register_task` adds to them."""
LONGEST_EMA = 0.28
"""Relative lengths of power-function averages are below that of the plain mean of a run, 1 / sqrt(12)."""


def _check(ok: bool, sentence: str) -> None:
    if not ok:
        raise UserError(sentence)


def _check_interval(low: float, high: float, section: str) -> None:
    _check(
        0.0 <= low <= high <= 1.0,
        f"{section}.guidance_low {low} and guidance_high {high} must obey 0 <= low <= high <= 1.",
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network's architecture. A preset fills the sizes; any field beside it overrides the preset's."""

    preset: str = "S/2"
    """Named size that fills the fields below it (`dpt presets` lists them)."""
    input_size: int = 32
    """Side of the latents the model is meant for, in latent pixels (image side / 8); other sizes work too."""
    patch_size: int = 2
    """Side of a token's patch, in latent pixels."""
    in_channels: int = 4
    """Channels of one latent image."""
    num_conditions: int = 0
    """Clean condition latents concatenated on channels before the noisy one (1: image; 2: image and prompt)."""
    hidden_size: int = 384
    """Width of the residual stream."""
    depth: int = 12
    """Number of transformer blocks."""
    num_heads: int = 6
    """Attention heads; divides hidden_size."""
    mlp_ratio: float = 4.0
    """Width of the MLP (and of a routed expert) over hidden_size."""
    num_classes: int = 1000
    """Labels, task labels included; the null label's id is num_classes."""
    class_dropout_prob: float = 0.1
    """Probability of replacing a label by the null label in training."""
    learn_sigma: bool = True
    """Predict the variance too (twice the output channels)."""
    qk_norm: bool = False
    """Normalise queries and keys per head (LayerNorm)."""
    mlp_norm_eps: float = 1e-6
    """Epsilon of the norm before each MLP (diffusers' DiT runs with 1e-5; all other norms have 1e-6)."""
    timestep_features: Literal["dit", "diffusers"] = "dit"
    """Frequencies of the timestep's sines, i = 0..127: DiT's 10000^(-i/128), or diffusers' 10000^(-i/127)."""
    patch_embed_tasks: int = 0
    """Input convolutions, one a task, chosen by the task label (PatchEmbedRouter); 0: one for all."""
    clip_embedding_size: int = 0
    """Width of the CLIP image embedding added to the conditioning vector; 0: none."""
    num_experts: int = 0
    """Routed experts in each block; 0: a dense MLP."""
    top_k: int = 2
    """Experts that each token is sent to."""
    expert_activation: Literal["swiglu", "gelu"] = "swiglu"
    """SwiGLU without biases (trained from scratch) or the dense GELU MLP with biases (upcycled)."""
    router_gate: Literal["softmax", "sigmoid"] = "softmax"
    """How a router's scores become experts' weights: softmax over all experts, or each expert's own sigmoid (DeepSeek-V3)."""
    shared_expert_width: int = 0
    """Width of the SwiGLU expert that every token passes through; 0: none."""
    normalize_top_k: bool = False
    """Rescale each token's top-k router weights to sum to 1."""
    capacity_factor: float = 0.0
    """Most tokens an expert takes, as a multiple of the even share; further ones are dropped. 0: no limit."""
    router_bias_balancing: bool = False
    """Balance experts by a routing bias instead of (or beside) the balance loss."""
    base_width: int = 0
    """muP: the hidden_size whose learning rate is to serve every width; 0: the standard parametrisation."""
    base_head_size: int = 64
    """muP: head size at which attention scores have their usual scale; they are divided by the head size, not by its root."""

    def __post_init__(self) -> None:
        for name in (
            "input_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "depth",
            "num_heads",
            "num_classes",
            "top_k",
            "base_head_size",
        ):
            _check(getattr(self, name) >= 1, f"dpt.model.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in (
            "num_conditions",
            "patch_embed_tasks",
            "clip_embedding_size",
            "num_experts",
            "shared_expert_width",
            "base_width",
        ):
            _check(getattr(self, name) >= 0, f"dpt.model.{name} is {getattr(self, name)}; it cannot be negative.")
        _check(
            self.patch_embed_tasks <= self.num_classes,
            f"dpt.model.patch_embed_tasks {self.patch_embed_tasks} is more than dpt.model.num_classes {self.num_classes}, "
            "the last of which are the tasks' labels; raise num_classes.",
        )
        _check(self.capacity_factor >= 0, f"dpt.model.capacity_factor is {self.capacity_factor}; it cannot be negative.")
        _check(self.mlp_norm_eps > 0, f"dpt.model.mlp_norm_eps is {self.mlp_norm_eps}; it must be positive.")
        _check(self.mlp_width >= 1, f"dpt.model.mlp_ratio is {self.mlp_ratio}; the MLP would have no width.")
        _check(
            self.hidden_size % self.num_heads == 0,
            f"dpt.model.num_heads {self.num_heads} does not divide dpt.model.hidden_size {self.hidden_size}; choose a divisor.",
        )
        _check(
            self.hidden_size % 4 == 0,
            f"dpt.model.hidden_size {self.hidden_size} is no multiple of 4, which the 2-D sin-cos position table needs.",
        )
        _check(
            self.input_size % self.patch_size == 0,
            f"dpt.model.patch_size {self.patch_size} does not divide dpt.model.input_size {self.input_size}.",
        )
        _check(
            self.num_experts == 0 or self.top_k <= self.num_experts,
            f"dpt.model.top_k {self.top_k} is more than dpt.model.num_experts {self.num_experts}; lower top_k.",
        )
        _check(
            0.0 <= self.class_dropout_prob < 1.0,
            f"dpt.model.class_dropout_prob is {self.class_dropout_prob}; it is a probability in [0, 1).",
        )

    @property
    def width_ratio(self) -> float:
        """muP's width multiplier: hidden_size over base_width; 1 without muP."""
        return self.hidden_size / self.base_width if self.base_width else 1.0

    @property
    def attention_scale(self) -> float:
        """What attention scores q.k are multiplied by."""
        head_size = self.hidden_size // self.num_heads
        return math.sqrt(self.base_head_size) / head_size if self.base_width else 1.0 / math.sqrt(head_size)

    @property
    def mlp_width(self) -> int:
        """Width of the MLP and of each routed expert."""
        return round(self.hidden_size * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The forward process and the training objective."""

    num_train_timesteps: int = 1000
    """Steps of the forward process."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """Noise schedule (diffusers' names)."""
    beta_start: float = 1e-4
    """First beta of the linear schedules."""
    beta_end: float = 2e-2
    """Last beta of the linear schedules."""
    rescale_betas_zero_snr: bool = False
    """Rescale the betas so that the last timestep is pure noise (zero terminal SNR; not with epsilon)."""
    prediction_type: Literal["epsilon", "sample", "v_prediction", "rectified_flow"] = "epsilon"
    """What the network predicts: the noise, the clean latents, v, or the velocity of a straight path."""
    time_convention: Literal["index", "fraction", "scaled_fraction"] = "index"
    """How the network is told of timestep t in 0..T-1: t, (t + 1) / T (DiT-MoE's rectified flow) or t + 1 (diffusers' flow)."""
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    """Which timesteps a sampler's steps fall on, unless dpt.evaluation.timestep_spacing says otherwise."""
    steps_offset: int = 0
    """Added to the timesteps of the spacing "leading" (Stable Diffusion: 1)."""
    set_alpha_to_one: bool = True
    """DDIM's last step ends at clean latents rather than at the noise level of timestep 0 (Stable Diffusion: false)."""
    vlb_weight: float = 1.0
    """Weight of the variational bound on the learned variance; 0: the variance output is ignored."""
    min_snr_gamma: float = 0.0
    """Min-SNR loss weighting; 0: off."""
    multires_noise_strength: float = 0.0
    """Multi-resolution noise, strength of each coarser level (Marigold: 0.9); 0: white noise."""
    multires_noise_annealed: bool = True
    """Scale the multi-resolution strength by t / T."""
    timesteps: Literal["uniform", "logit_normal", "last"] = "uniform"
    """Timesteps trained at: all alike, more of the middle ones, or the last alone: one pass from pure noise then predicts."""
    timestep_location: float = 0.0
    """Mean of logit(t / T) for "logit_normal"; above 0: more noise."""
    timestep_scale: float = 1.0
    """Standard deviation of logit(t / T) for "logit_normal"."""
    initial_noise: Literal["random", "fixed", "zero"] = "random"
    """What a network of the last timestep starts from: fresh noise, one noise for all samples, or zeros."""

    def __post_init__(self) -> None:
        _check(
            self.num_train_timesteps >= 2,
            f"dpt.diffusion.num_train_timesteps is {self.num_train_timesteps}; it must be at least 2.",
        )
        _check(
            0.0 < self.beta_start <= self.beta_end < 1.0,
            f"dpt.diffusion.beta_start {self.beta_start} and beta_end {self.beta_end} must obey 0 < start <= end < 1.",
        )
        for name in ("vlb_weight", "min_snr_gamma", "multires_noise_strength"):
            _check(getattr(self, name) >= 0, f"dpt.diffusion.{name} is {getattr(self, name)}; it cannot be negative.")
        _check(
            0 <= self.steps_offset < self.num_train_timesteps,
            f"dpt.diffusion.steps_offset is {self.steps_offset}; it must be from 0 to below num_train_timesteps.",
        )
        _check(
            not (self.rescale_betas_zero_snr and self.prediction_type == "rectified_flow"),
            "dpt.diffusion.rescale_betas_zero_snr does not apply to rectified_flow, which has no betas; set it to false.",
        )
        _check(self.timestep_scale > 0, f"dpt.diffusion.timestep_scale is {self.timestep_scale}; it must be positive.")
        self._check_one_step()

    def with_schedule(self, beta_schedule: str) -> "DiffusionConfig":
        """This objective on another noise schedule, with the betas that belong to that one; on its own, unchanged.

        linear: 1e-4 to 2e-2 (Ho et al. 2020); scaled_linear: 8.5e-4 to 1.2e-2 (Stable Diffusion); squaredcos_cap_v2 has no
        range. UserError for rectified flow, which has no noise schedule.
        """
        _check(
            self.prediction_type != "rectified_flow",
            f"rectified flow has no noise schedule to be replaced by {beta_schedule}; leave the schedule out.",
        )
        if beta_schedule == self.beta_schedule:
            return self
        start, end = (8.5e-4, 1.2e-2) if beta_schedule == "scaled_linear" else (1e-4, 2e-2)
        return replace(self, beta_schedule=beta_schedule, beta_start=start, beta_end=end)  # type: ignore[arg-type]

    def _check_one_step(self) -> None:
        if not self.one_step:
            _check(
                self.initial_noise == "random",
                f'dpt.diffusion.initial_noise is "{self.initial_noise}"; that goes with timesteps "last" only.',
            )
            return
        _check(
            self.prediction_type != "epsilon",
            'dpt.diffusion.timesteps is "last", where all that the network sees is noise, and prediction_type is "epsilon"; '
            "choose v_prediction or sample.",
        )
        for name in ("vlb_weight", "min_snr_gamma"):
            _check(
                getattr(self, name) == 0,
                f'dpt.diffusion.{name} is {getattr(self, name)}; it has no meaning for timesteps "last": set it to 0.',
            )
        _check(
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
    """A loss of decoded predictions beside that of latents, for one-step networks (diffusion.timesteps "last")."""

    weight: float = 0.0
    """Weight of the pixel loss; 0: off, and no decoder is held."""
    latent_weight: float = 1.0
    """Weight of the loss of latents beside it."""
    depth: Literal["affine_l1", "affine_l2"] = "affine_l1"
    """Error of depth, after a least-squares scale and shift. (Flow: end-point error in pixels; masks: cross-entropy.)"""
    gradient_weight: float = 0.5
    """Weight of depth's multi-scale gradient error, beside its error."""

    def __post_init__(self) -> None:
        for name in ("weight", "latent_weight", "gradient_weight"):
            _check(getattr(self, name) >= 0, f"dpt.pixel_loss.{name} is {getattr(self, name)}; it cannot be negative.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which shards are read, and how."""

    shards: list[str] = field(default_factory=list)
    """Shard folders, brace patterns ("x/{000000..000127}.tar") or URLs; several sets are mixed."""
    weights: list[float] = field(default_factory=list)
    """Share of each set in a mixture; empty: by number of samples."""
    vae: str = "embedded"
    """VAE that made the latents: "embedded", a folder, or a name on the hub; checked against the manifest."""
    posterior: Literal["sample", "mean"] = "sample"
    """Take latents as samples of the VAE posterior (pre-training) or as its mean (perception)."""
    horizontal_flip: bool = False
    """Show mirrored samples half of the time; the shards must hold mirrored latents."""
    num_workers: int = 0
    """Threads per rank that read shards, and as many that fetch them; 0: the one that fills batches reads, one fetches."""
    cache_dir: str = ""
    """Folder that keeps shards fetched from URLs (it grows to the size of the sets); empty: fetched anew every epoch."""
    verify: bool = True
    """Hash every shard ahead of its first use, as in the manifest: a bit that has flipped is named, never trained on."""
    max_bad_samples: int = 0
    """Unreadable samples that are skipped (and counted) before the run stops."""

    def __post_init__(self) -> None:
        _check(
            not self.weights or len(self.weights) == len(self.shards),
            f"dpt.data.weights has {len(self.weights)} entries for {len(self.shards)} sets in dpt.data.shards; give one a set.",
        )
        _check(all(w > 0 for w in self.weights), f"dpt.data.weights {self.weights}: every weight must be positive.")
        for name in ("num_workers", "max_bad_samples"):
            _check(getattr(self, name) >= 0, f"dpt.data.{name} is {getattr(self, name)}; it cannot be negative.")


@dataclass(frozen=True, kw_only=True)
class UpcyclingConfig:
    """How a dense network becomes a Mixture-of-Experts (launchers/upcycle.py)."""

    num_experts: int = 8
    """Copies of each MLP."""
    top_k: int = 2
    """Experts that each token is sent to."""
    normalize_top_k: bool = True
    """Rescale top-k weights to sum to 1: the upcycled network is then exactly the dense one at step 0."""
    granularity: int = 1
    """Finer experts that each copy is split into."""
    noise_std: float = 0.0
    """Noise added to the copies, in units of each weight's own standard deviation, to break their symmetry."""
    reinit_share: float = 0.0
    """Share of each copy's hidden units that are drawn anew (Drop-Upcycling: 0.5); 0: exact copies."""

    def __post_init__(self) -> None:
        _check(self.num_experts >= 1, f"dpt.upcycling.num_experts is {self.num_experts}; it must be at least 1.")
        _check(
            1 <= self.top_k <= self.num_experts,
            f"dpt.upcycling.top_k is {self.top_k}; it must be between 1 and num_experts ({self.num_experts}).",
        )
        _check(self.granularity >= 1, f"dpt.upcycling.granularity is {self.granularity}; it must be at least 1.")
        _check(self.noise_std >= 0, f"dpt.upcycling.noise_std is {self.noise_std}; it cannot be negative.")
        _check(
            0.0 <= self.reinit_share <= 1.0,
            f"dpt.upcycling.reinit_share is {self.reinit_share}; it is a share between 0 and 1.",
        )
        _check(
            self.reinit_share == 0 or self.num_experts > 1,
            f"dpt.upcycling.reinit_share is {self.reinit_share}, but num_experts is 1, which has no other to differ from; set "
            "it to 0.",
        )

    def apply(self, dense: ModelConfig) -> ModelConfig:
        """The architecture that upcycling makes of a dense one: num_experts copies of each MLP, split granularity times."""
        return replace(
            dense,
            num_experts=self.num_experts * self.granularity,
            top_k=self.top_k * self.granularity,
            mlp_ratio=dense.mlp_ratio / self.granularity,
            expert_activation="gelu",
            normalize_top_k=self.normalize_top_k,
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Pictures drawn while training: class samples in pre-training, and the experts' routing."""

    every: int = 0
    """Draw them every this many steps; 0: only at the end."""
    labels: list[int] = field(default_factory=list)
    """Class ids drawn, one a picture; empty: the first eight."""
    num_inference_steps: int = 50
    """DDIM steps."""
    guidance_scale: float = 4.0
    """Classifier-free guidance; 1: none."""
    guidance_channels: int = 0
    """Latent channels that guidance acts on; 0: all (public DiT: 3 of 4)."""
    guidance_low: float = 0.0
    """Least noise level, as a share of the timesteps, at which guidance acts."""
    guidance_high: float = 1.0
    """Greatest noise level, as a share of the timesteps, at which guidance acts."""

    def __post_init__(self) -> None:
        _check_interval(self.guidance_low, self.guidance_high, "dpt.sampling")
        for name in ("every", "guidance_channels"):
            NOT_NEGATIVE.check(f"dpt.sampling.{name}", getattr(self, name))
        Range(least=1, most=1000).check("dpt.sampling.num_inference_steps", self.num_inference_steps)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, learning rate, EMA, checkpoints and safety. Batch, precision, ZeRO, optimizer and clipping are DeepSpeed's."""

    output_dir: str = "runs/pretrain"
    """Folder of checkpoints, exported weights and records."""
    steps: int = 400_000
    """Optimizer steps; 0: only export the weights that training would start from."""
    seed: int = 0
    """Seed of weights, data order and noise."""
    weights: str = ""
    """Weights to start from: an exported folder, a checkpoint, public weights, or hub:owner/name[@revision]; empty: random."""
    use_ema: bool = True
    """Start from the EMA of those weights rather than the plain ones."""
    ep_size: int = 1
    """Ranks that share the experts of a layer; divides the ranks and the experts."""
    lr_schedule: Literal["constant", "exponential", "cosine"] = "constant"
    """Course of the learning rate from optimizer.params.lr to lr_final."""
    lr_final: float = 0.0
    """Learning rate at the last step (exponential, cosine)."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    ema_decays: list[float] = field(default_factory=lambda: [0.9999])
    """Decays of the averaged weights kept; the first is what is exported and sampled."""
    ema_warmup: bool = False
    """Start with short averages: decay min(d, (1 + step) / (10 + step))."""
    ema_lengths: list[float] = field(default_factory=list)
    """Power-function averages kept (EDM2), by length relative to the run, such as [0.05, 0.1]: `dpt export --ema-length` makes
    an average of any length of their snapshots."""
    ema_snapshots: int = 32
    """Most snapshots of these kept; when there are more, every second one goes."""
    ema_snapshot_every: int = 0
    """Steps between the first snapshots; 0: the power of two above steps / ema_snapshots."""
    balance_loss_weight: float = 0.01
    """Weight of the experts' load-balancing loss, per layer."""
    router_z_loss_weight: float = 0.0
    """Weight of the router z-loss, per layer."""
    bypass_share: float = 0.0
    """Share of each sample's tokens, chosen at random, that go around the middle blocks in training (TREAD); 0: none."""
    bypass_first: int = 2
    """Blocks at the start that all tokens go through."""
    bypass_last: int = 4
    """Blocks at the end that all tokens go through."""
    self_alignment: SelfAlignmentConfig = field(default_factory=SelfAlignmentConfig)
    """Hidden states aligned with those of the averaged network at less noise (SRA)."""
    feature_alignment: FeatureAlignmentConfig = field(default_factory=FeatureAlignmentConfig)
    """Hidden states aligned with features that the shards hold (REPA)."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass to save memory."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    log_every: int = 10
    """Steps between records."""
    checkpoint_every: int = 10_000
    """Steps between resume checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    expert_distance_every: int = 0
    """Steps between measurements of how different each layer's experts are (experts/distance); 0: none."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for good; 0: none."""
    resume: bool = True
    """Continue from the newest complete checkpoint in output_dir."""
    resume_changed: bool = False
    """Continue, too, where fields that decide the course of the training are not those of the run in output_dir."""
    max_skipped_steps: int = 10
    """Non-finite steps in a row before the run goes back to its last checkpoint and leaves out the samples in between."""
    timeout_s: float = 1800.0
    """Seconds without progress on a rank before all ranks stop."""
    check_memory: Literal["refuse", "warn"] = "refuse"
    """What to do when the memory plan is above what is free: refuse to start, or say so and try."""

    def __post_init__(self) -> None:
        _check(self.steps >= 0, f"dpt.training.steps is {self.steps}; it cannot be negative.")
        _check(self.ep_size >= 1, f"dpt.training.ep_size is {self.ep_size}; it must be at least 1.")
        _check(len(self.ema_decays) >= 1, "dpt.training.ema_decays is empty; give at least one decay (0 turns averaging off).")
        _check(
            all(0.0 <= d < 1.0 for d in self.ema_decays),
            f"dpt.training.ema_decays {self.ema_decays}: every decay must be in [0, 1).",
        )
        _check(
            all(0.0 < length <= LONGEST_EMA for length in self.ema_lengths)
            and len(set(self.ema_lengths)) == len(self.ema_lengths),
            f"dpt.training.ema_lengths {self.ema_lengths}: every length must be in (0, {LONGEST_EMA}], and none there twice.",
        )
        _check(self.ema_snapshots >= 2, f"dpt.training.ema_snapshots is {self.ema_snapshots}; it must be at least 2.")
        _check(
            self.lr_schedule == "constant" or self.lr_final > 0,
            f"dpt.training.lr_final is {self.lr_final}; the {self.lr_schedule} schedule needs a positive value.",
        )
        _check(
            self.ema_snapshot_every >= 0,
            f"dpt.training.ema_snapshot_every is {self.ema_snapshot_every}; it cannot be negative.",
        )
        for name in (
            "lr_final",
            "warmup_steps",
            "balance_loss_weight",
            "router_z_loss_weight",
            "checkpoint_every",
            "keep_every",
            "expert_distance_every",
        ):
            _check(getattr(self, name) >= 0, f"dpt.training.{name} is {getattr(self, name)}; it cannot be negative.")
        for name in ("log_every", "keep_last", "max_skipped_steps", "timeout_s"):
            _check(getattr(self, name) > 0, f"dpt.training.{name} is {getattr(self, name)}; it must be positive.")
        _check(0.0 <= self.bypass_share < 1.0, f"dpt.training.bypass_share is {self.bypass_share}; it must be in [0, 1).")
        _check(self.bypass_first >= 0, f"dpt.training.bypass_first is {self.bypass_first}; it cannot be negative.")
        _check(
            self.bypass_last > 0,
            f"dpt.training.bypass_last is {self.bypass_last}; the last block at least must see all tokens: set 1 or more.",
        )

    @property
    def teaching_decay(self) -> float:
        """Decay of the average that self-alignment learns from."""
        return self.self_alignment.ema_decay or self.ema_decays[0]

    def bypassed(self, depth: int) -> range:
        """The blocks, of so many, that tokens go around; empty if there are none between the first and the last ones."""
        return range(self.bypass_first, depth - self.bypass_last)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What the evaluator predicts and scores. Lists are swept."""

    weights: str = ""
    """Weights to evaluate: an exported folder, a checkpoint (or a run's folder: its newest), public weights, or
    hub:owner/name[@revision]."""
    use_ema: bool = True
    """Evaluate the averaged weights rather than the plain ones."""
    data: list[str] = field(default_factory=list)
    """Evaluation shard folders, or URLs of them (dpt.data.cache_dir keeps what is fetched)."""
    protocol: str = ""
    """Protocol that scores them; empty: the one of each shard folder's data set."""
    steps: list[int] = field(default_factory=lambda: [50])
    """Sampler steps."""
    ensemble: list[int] = field(default_factory=lambda: [1])
    """Ensemble sizes."""
    aggregation: Literal["median", "mean", "compile"] = "compile"
    """How members are merged: pixelwise, or after affine alignment (median compilation; depth only)."""
    sampler: Literal["ddim", "ddpm", "dpmsolver++"] = "ddim"
    """Sampler."""
    eta: float = 0.0
    """DDIM's stochasticity, 0 to 1."""
    schedule: Literal["", "linear", "scaled_linear", "squaredcos_cap_v2"] = ""
    """Noise schedule at test time, with its own usual betas; empty: the one of training."""
    timestep_spacing: Literal["", "leading", "trailing", "linspace"] = ""
    """Which timesteps the steps fall on; empty: as the weights say (dpt.diffusion.timestep_spacing: trailing by default)."""
    step_power: float = 1.0
    """Over 1: more steps at low noise; under 1: more at high noise."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1: none."""
    guidance_low: float = 0.0
    """Least noise level, as a share of the timesteps, at which guidance acts."""
    guidance_high: float = 1.0
    """Greatest noise level, as a share of the timesteps, at which guidance acts; beyond the two, steps cost one pass."""
    batch_size: int = 16
    """Predictions (samples x members) computed at once on a rank."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Number format of the network's products (tf32: float32 rounded to 10 bits, on GPUs only); the sampler works in fp32."""
    max_samples: int = 0
    """Score only the first samples; 0: all."""
    seed: int = 0
    """Seed of the initial noise."""
    pictures: int = 4
    """Best, median and worst samples drawn, and some that are the same for every model, each this many; 0: none."""
    predictions: str = ""
    """Folder of another system's ready-made predictions to score instead."""
    save_predictions: bool = False
    """Keep every prediction as a file."""
    output_dir: str = "runs/evaluate"
    """Folder of results."""

    def __post_init__(self) -> None:
        _check(
            all(1 <= s <= 1000 for s in self.steps) and len(self.steps) > 0,
            f"dpt.evaluation.steps {self.steps}: each must be between 1 and 1000.",
        )
        _check(
            all(1 <= n <= 50 for n in self.ensemble) and len(self.ensemble) > 0,
            f"dpt.evaluation.ensemble {self.ensemble}: each must be between 1 and 50.",
        )
        _check_interval(self.guidance_low, self.guidance_high, "dpt.evaluation")
        _check(0.0 <= self.eta <= 1.0, f"dpt.evaluation.eta is {self.eta}; it must be in [0, 1].")
        _check(self.step_power > 0, f"dpt.evaluation.step_power is {self.step_power}; it must be positive.")
        _check(self.batch_size >= 1, f"dpt.evaluation.batch_size is {self.batch_size}; it must be at least 1.")
        for name in ("max_samples", "pictures"):
            _check(getattr(self, name) >= 0, f"dpt.evaluation.{name} is {getattr(self, name)}; it cannot be negative.")

    def settled(self, diffusion: DiffusionConfig) -> "EvaluationConfig":
        """These settings as weights trained for `diffusion` are used with them: a one-step network takes one step, whatever is
        asked for, and one ensemble member where it starts from the same noise every time."""
        if not diffusion.one_step:
            return self
        return replace(self, steps=[1], ensemble=self.ensemble if diffusion.initial_noise == "random" else [1])


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Scores of evaluation sets while training, and what follows from them (perception only)."""

    every: int = 0
    """Steps between validations; 0: none. The last step is validated too."""
    data: list[str] = field(default_factory=list)
    """Evaluation shard folders; empty: those of dpt.evaluation.data."""
    max_samples: int = 64
    """Score only the first samples of each set; 0: all."""
    steps: int = 10
    """Sampler steps; what else concerns sampling is that of dpt.evaluation."""
    ensemble: int = 1
    """Ensemble size."""
    metric: str = ""
    """What tells the best weights, e.g. depth/abs_rel or depth/hypersim_val/delta1; empty: the first set's main metric."""
    keep_best: bool = True
    """Export the averaged weights of the best validation to OUTPUT_DIR/best."""
    patience: int = 0
    """End the training after so many validations in a row that were not better; 0: never."""

    def __post_init__(self) -> None:
        for name in ("every", "max_samples", "patience"):
            _check(getattr(self, name) >= 0, f"dpt.validation.{name} is {getattr(self, name)}; it cannot be negative.")
        _check(1 <= self.steps <= 1000, f"dpt.validation.steps is {self.steps}; it must be between 1 and 1000.")
        _check(1 <= self.ensemble <= 50, f"dpt.validation.ensemble is {self.ensemble}; it must be between 1 and 50.")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are recorded."""

    enabled: bool = True
    """Record the run in MLflow."""
    offline: bool = False
    """Keep the records in the output folder until `dpt sync` sends them, where training cannot reach the store."""
    uri: str = "sqlite:///mlflow.db"
    """MLflow tracking store: an SQLite file or a server's address."""
    experiment: str = "dpt"
    """Experiment that the run belongs to."""
    run_name: str = ""
    """Name of the run; empty: stage, preset and task."""
    tags: dict[str, str] = field(default_factory=dict)
    """Further tags of the run."""
    system_every: float = 10.0
    """Seconds between samples of every node's processors, memory, disks, network and GPUs (MLflow's names); 0: none."""
    registered_model: str = ""
    """Name in MLflow's model registry that the exported weights become a version of; empty: none."""

    def __post_init__(self) -> None:
        _check(
            not set(self.registered_model) & set("/:'\""),
            f'dpt.tracking.registered_model is "{self.registered_model}"; names in MLflow\'s registry have no / : or quotes.',
        )
        _check(self.system_every >= 0, f"dpt.tracking.system_every is {self.system_every}; it cannot be negative.")
