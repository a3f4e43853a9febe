"""Read diffusers' scheduler folders as a `DiffusionConfig`: their settings are adopted, or refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpt.config.recipe import section_from_dict
from dpt.config.sections import DiffusionConfig
from dpt.errors import UserError
from dpt.models.weight_files import read_json_object

SCHEDULER_FILE = "scheduler_config.json"

_CLASSES: dict[str, dict[str, Any]] = {  # each with those of its defaults that differ from DiffusionConfig's
    "DDIMScheduler": {"timestep_spacing": "leading", "clip_sample": True},
    "DDPMScheduler": {"timestep_spacing": "leading", "clip_sample": True},
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace"},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace"},
}
_FLOW = "FlowMatchEulerDiscreteScheduler"
TAKEN = (
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type"),
    *("timestep_spacing", "steps_offset", "set_alpha_to_one", "rescale_betas_zero_snr"),
)
"""Fields of a `DiffusionConfig` that a scheduler's file has under the same names."""
_IGNORED = (  # no effect on the supported settings
    *("skip_prk_steps", "sample_max_value", "dynamic_thresholding_ratio", "clip_sample_range", "lower_order_final"),
    *("flow_shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"),
)
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("clip_sample", "thresholding", "euler_at_final", "invert_sigmas", "stochastic_sampling"), (False,)),
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), (False, None)),
    **dict.fromkeys(("use_flow_sigmas", "use_dynamic_shifting"), (False, None)),
    **dict.fromkeys(("trained_betas", "sigma_min", "sigma_max", "shift_terminal"), (None,)),
    "variance_type": (None, "fixed_small", "fixed_small_log", "learned_range"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "algorithm_type": ("dpmsolver++",),
    "lambda_min_clipped": (-float("inf"),),
    "shift": (1.0,),
}


def read_scheduler(path: str | Path) -> DiffusionConfig:
    """The objective that a diffusers scheduler folder, or its scheduler_config.json, describes.

    DDIM, DDPM, PNDM, Euler and DPM-Solver++ name a noise schedule, what is predicted and which timesteps are visited; flow
    matching is rectified flow whose network takes t + 1. The solver is chosen at test time. What a file does not say
    is its class's default in diffusers. UserError names fields that are unknown, or set to what dpt does not support.
    """
    file = Path(path) / SCHEDULER_FILE if Path(path).is_dir() else Path(path)
    given = read_json_object(file)
    kind = given.get("_class_name", "DDIMScheduler")
    if kind != _FLOW and kind not in _CLASSES:
        raise UserError(f"{file}: _class_name is {kind!r}; known are {', '.join([*_CLASSES, _FLOW])}.")
    values = {**_CLASSES.get(kind, {}), **{name: value for name, value in given.items() if not name.startswith("_")}}
    unknown = sorted(values.keys() - {*TAKEN, *_IGNORED, *_SUPPORTED})
    if unknown:
        raise UserError(f"{file}: unknown to dpt: {', '.join(unknown)}; remove what changes nothing, or name another.")
    for name, supported in _SUPPORTED.items():
        if name in values and values[name] not in supported:
            note = ", diffusers' default" if name not in given else ""
            raise UserError(f"{file}: {name} is {values[name]!r}{note}; dpt has only {' or '.join(map(repr, supported))}.")
    taken = {name: value for name, value in values.items() if name in TAKEN}
    if kind == _FLOW:
        flow = {"prediction_type": "rectified_flow", "time_convention": "scaled_fraction", "timestep_spacing": "linspace"}
        taken = {name: value for name, value in taken.items() if name == "num_train_timesteps"} | flow
    config: DiffusionConfig = section_from_dict(DiffusionConfig, taken, str(file), prefix="scheduler")
    return config


def pipeline_scheduler(folder: Path) -> DiffusionConfig | None:
    """The scheduler of the diffusers pipeline in `folder`; None if it has none."""
    file = folder / "scheduler" / SCHEDULER_FILE
    return read_scheduler(file) if file.is_file() else None


def describe(values: Mapping[str, Any], source: str) -> str:
    """Summarise a "diffusion" section in one line. UserError, naming `source`, for fields that dpt does not know."""
    config = section_from_dict(DiffusionConfig, values, source, prefix="diffusion")
    text = f"{config.prediction_type}, {config.num_train_timesteps} timesteps ({config.timestep_spacing})"
    if config.prediction_type == "rectified_flow":
        return f"{text}, time as {config.time_convention}"
    span = "" if config.beta_schedule == "squaredcos_cap_v2" else f" {config.beta_start:g} to {config.beta_end:g}"
    zero = ", zero terminal SNR" if config.rescale_betas_zero_snr else ""
    return (
        f"{text}, {config.beta_schedule}{span}{zero}, steps_offset {config.steps_offset}, "
        f"set_alpha_to_one {str(config.set_alpha_to_one).lower()}, time as {config.time_convention}"
    )
