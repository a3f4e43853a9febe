"""The sections of a recipe's "dpt" object: typed, frozen, each field with its meaning, unit and default.

Single fields are validated here (`__post_init__`); checks across sections are in `checks.py`.
"""

from dpt.config.sections.alignment import FeatureAlignmentConfig, SelfAlignmentConfig
from dpt.config.sections.data import DataConfig
from dpt.config.sections.diffusion import DiffusionConfig, PixelLossConfig, SamplingConfig
from dpt.config.sections.evaluation import EvaluationConfig, ValidationConfig
from dpt.config.sections.model import CONDITIONS, TIMESTEP_FEATURES, ModelConfig, Task, UpcyclingConfig
from dpt.config.sections.tracking import TrackingConfig
from dpt.config.sections.training import LONGEST_EMA, TrainingConfig

__all__ = [
    "CONDITIONS",
    "LONGEST_EMA",
    "TIMESTEP_FEATURES",
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "FeatureAlignmentConfig",
    "ModelConfig",
    "PixelLossConfig",
    "SamplingConfig",
    "SelfAlignmentConfig",
    "Task",
    "TrackingConfig",
    "TrainingConfig",
    "UpcyclingConfig",
    "ValidationConfig",
]
