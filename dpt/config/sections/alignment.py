"""Parts of the section "training": alignment of hidden states with the averaged network, or with given features."""

from dataclasses import dataclass

from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE
from dpt.config.sections.checking import check, check_fields, check_interval


@dataclass(frozen=True, kw_only=True)
class SelfAlignmentConfig:
    """Align an early block's output, through a projector, with a later block's of the averaged network at less noise (SRA)."""

    weight: float = 0.0
    """Weight of the loss (SRA: 0.2); 0: off, and no averaged network is held."""
    student_block: int = 8
    """Block whose output is aligned, counted from 1 (SRA: 8 of XL/2's 28)."""
    teacher_block: int = 20
    """Later block of the averaged network that it is aligned with; blocks after it are not computed (SRA: 20 of 28)."""
    offset_low: float = 0.0
    """Smallest difference between the two noise levels, as a share of the timesteps."""
    offset_high: float = 0.2
    """Largest difference between the noise levels, as a share of the timesteps; each sample's is random between the two."""
    ema_decay: float = 0.0
    """Decay of the average used as teacher, one of training.ema_decays; 0: the first."""

    def __post_init__(self) -> None:
        name = "dpt.training.self_alignment"
        check_fields(self, name, NOT_NEGATIVE, "weight")
        check(
            1 <= self.student_block < self.teacher_block,
            f"{name}.student_block {self.student_block} and teacher_block {self.teacher_block} must obey "
            "1 <= student < teacher.",
        )
        check_interval(self, name, "offset")


@dataclass(frozen=True, kw_only=True)
class FeatureAlignmentConfig:
    """Align a block's output, through a projector, with features in the shards, token by token (REPA)."""

    weight: float = 0.0
    """Weight of the loss (REPA: 0.5); 0: off, and features are not read."""
    block: int = 8
    """Block whose output is aligned, counted from 1 (REPA: 8 of XL/2's 28)."""
    channels: int = 0
    """Channels of the features in the shards (normals: 3, segments: 13)."""
    projector_width: int = 2048
    """Width of the projector's two hidden layers (REPA: 2048)."""

    def __post_init__(self) -> None:
        check_fields(self, "dpt.training.feature_alignment", NOT_NEGATIVE, "weight", "channels")
        check_fields(self, "dpt.training.feature_alignment", AT_LEAST_1, "block", "projector_width")
