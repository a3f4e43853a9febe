"""Training: its length, layout and outputs."""

from dataclasses import dataclass, field
from typing import Literal

from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, Range
from dpt.config.sections.alignment import FeatureAlignmentConfig, SelfAlignmentConfig
from dpt.config.sections.checking import check, check_fields

LONGEST_EMA = 0.28
"""Relative lengths of power-function averages must be below that of the plain mean of a run, 1 / sqrt(12)."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, learning rate, EMA, checkpoints and safety. Batch, precision, ZeRO, optimizer and clipping are DeepSpeed's."""

    output_dir: str = "runs/pretrain"
    """Folder of checkpoints, exported weights and records."""
    steps: int = 400_000
    """Optimizer steps; 0: only export the initial weights."""
    seed: int = 0
    """Seed of weights, data order and noise."""
    weights: str = ""
    """Weights to start from: an exported folder, a checkpoint, public weights, or hub:owner/name[@revision]; empty: random."""
    use_ema: bool = True
    """Start from the EMA of those weights rather than the plain ones."""
    ep_size: int = 1
    """Ranks that share the experts of a layer; divides the ranks and the experts."""
    lr_schedule: Literal["constant", "exponential", "cosine"] = "constant"
    """Learning-rate schedule from optimizer.params.lr to lr_final."""
    lr_final: float = 0.0
    """Learning rate at the last step (exponential, cosine)."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    ema_decays: list[float] = field(default_factory=lambda: [0.9999])
    """Decays of the averages kept; the first is exported and sampled."""
    ema_warmup: bool = False
    """Start with short averages: decay min(d, (1 + step) / (10 + step))."""
    ema_lengths: list[float] = field(default_factory=list)
    """Power-function averages kept (EDM2), by length relative to the run, such as [0.05, 0.1]: `dpt export --ema-length` makes
    an average of any length of their snapshots."""
    ema_snapshots: int = 32
    """Maximum snapshots kept; beyond that, every second one is deleted."""
    ema_snapshot_every: int = 0
    """Steps between the first snapshots; 0: the power of two above steps / ema_snapshots."""
    balance_loss_weight: float = 0.01
    """Weight of the experts' load-balancing loss, per layer."""
    router_z_loss_weight: float = 0.0
    """Weight of the router z-loss, per layer."""
    bypass_share: float = 0.0
    """Share of each sample's tokens, chosen at random, that skip the middle blocks in training (TREAD); 0: none."""
    bypass_first: int = 2
    """Number of first blocks, which no token skips."""
    bypass_last: int = 4
    """Number of last blocks, which no token skips."""
    self_alignment: SelfAlignmentConfig = field(default_factory=SelfAlignmentConfig)
    """Alignment of hidden states with those of the averaged network at less noise (SRA)."""
    feature_alignment: FeatureAlignmentConfig = field(default_factory=FeatureAlignmentConfig)
    """Alignment of hidden states with features in the shards (REPA)."""
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
    """Steps between measurements of the distance between a layer's experts (experts/distance); 0: none."""
    keep_every: int = 0
    """Keep checkpoints at multiples of this step for good; 0: none."""
    resume: bool = True
    """Resume from the newest complete checkpoint in output_dir."""
    resume_changed: bool = False
    """Resume even if fields that determine the course of training differ from those of the run in output_dir."""
    max_skipped_steps: int = 10
    """Non-finite steps in a row before the run rewinds to its last checkpoint and skips the samples in between."""
    timeout_s: float = 1800.0
    """Seconds without progress on a rank before all ranks stop."""
    check_memory: Literal["refuse", "warn"] = "refuse"
    """Response when the memory plan exceeds free memory: refuse to start, or warn and try."""

    def __post_init__(self) -> None:
        weights, intervals = ("balance_loss_weight", "router_z_loss_weight"), ("checkpoint_every", "keep_every")
        check_fields(self, "dpt.training", NOT_NEGATIVE, "steps", "lr_final", "warmup_steps", *weights, *intervals)
        check_fields(self, "dpt.training", NOT_NEGATIVE, "ema_snapshot_every", "expert_distance_every", "bypass_first")
        check_fields(self, "dpt.training", AT_LEAST_1, "ep_size", "bypass_last")
        check_fields(self, "dpt.training", POSITIVE, "log_every", "keep_last", "max_skipped_steps", "timeout_s")
        check_fields(self, "dpt.training", Range(least=2), "ema_snapshots")
        check_fields(self, "dpt.training", Range(least=0, below=1), "bypass_share")
        check(len(self.ema_decays) >= 1, "dpt.training.ema_decays is empty; give at least one decay (0 turns averaging off).")
        check(
            all(0.0 <= d < 1.0 for d in self.ema_decays),
            f"dpt.training.ema_decays {self.ema_decays}: every decay must be in [0, 1).",
        )
        check(
            all(0.0 < length <= LONGEST_EMA for length in self.ema_lengths)
            and len(set(self.ema_lengths)) == len(self.ema_lengths),
            f"dpt.training.ema_lengths {self.ema_lengths}: every length must be in (0, {LONGEST_EMA}], without repeats.",
        )
        check(
            self.lr_schedule == "constant" or self.lr_final > 0,
            f"dpt.training.lr_final is {self.lr_final}; the {self.lr_schedule} schedule needs a positive value.",
        )

    @property
    def teaching_decay(self) -> float:
        """Decay of self-alignment's teacher average."""
        return self.self_alignment.ema_decay or self.ema_decays[0]

    def bypassed(self, depth: int) -> range:
        """The blocks, out of `depth`, that tokens may skip; empty if none lie between the first and last ones."""
        return range(self.bypass_first, depth - self.bypass_last)
