"""Turn public weights (DiT, DiT-MoE, the released generalist, a diffusers folder) into a folder that every stage loads."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, get_args

from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, numeric
from dpt.config.recipe import section_from_dict
from dpt.config.sections import DiffusionConfig, Task
from dpt.data.codec import load_vae
from dpt.errors import UserError
from dpt.fits import FITS, Fit, as_section, fits_of
from dpt.models.exporting import export_weights
from dpt.models.pretrained import read_weights
from dpt.models.schedulers import describe, read_scheduler
from dpt.models.weights import Weights


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        help=".pt or .safetensors file, a diffusers folder, or such on the hub: hub:owner/name[/path][@revision]",
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--task", choices=get_args(Task), help="what they are for (default: what the file tells, or class)")
    parser.add_argument("--vae", default="", help="VAE of their latents, e.g. stabilityai/sd-vae-ft-ema")
    parser.add_argument("--heads", type=numeric(int, AT_LEAST_1), help="attention heads, where the shapes do not tell")
    parser.add_argument("--top-k", type=numeric(int, AT_LEAST_1), help="experts of a token, where the shapes do not tell")
    parser.add_argument("--variant", default="", help="which files of a diffusers folder, e.g. fp16 (default: the plain ones)")
    parser.add_argument("--fit", choices=FITS, help="how pictures came to their size in training (default: "
                        "flow of the released generalist stretch, else aspect)")  # fmt: skip
    parser.add_argument("--plain", action="store_true", help="the plain weights, if the file has averaged ones too")
    objective = parser.add_argument_group("objective", "over --scheduler, which is over what the file tells")
    objective.add_argument("--scheduler", type=Path, help="a diffusers scheduler folder, or its scheduler_config.json")
    objective.add_argument(
        "--objective", choices=("epsilon", "sample", "v_prediction", "rectified_flow"), help="what they predict"
    )
    objective.add_argument(
        "--schedule", choices=("linear", "scaled_linear", "squaredcos_cap_v2"), help="noise schedule, with its usual betas"
    )
    objective.add_argument("--beta-start", type=numeric(float, POSITIVE), help="first beta of a linear schedule")
    objective.add_argument("--beta-end", type=numeric(float, POSITIVE), help="last beta of a linear schedule")
    flag = argparse.BooleanOptionalAction
    objective.add_argument("--zero-terminal-snr", action=flag, help="betas rescaled so that the last timestep is pure noise")
    objective.add_argument("--set-alpha-to-one", action=flag, help="DDIM's last step ends at clean latents")
    objective.add_argument(
        "--steps-offset", type=numeric(int, NOT_NEGATIVE), help='added to the timesteps of the spacing "leading"'
    )
    objective.add_argument(
        "--timestep-spacing", choices=("leading", "trailing", "linspace"), help="which timesteps a sampler's steps fall on"
    )
    objective.add_argument(
        "--time-convention",
        choices=("index", "fraction", "scaled_fraction"),
        help="what the network is told of timestep t: t, (t + 1) / T or t + 1 (default: fraction for DiT-MoE's rectified flow)",
    )


_FIELDS = {
    "objective": "prediction_type",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "zero_terminal_snr": "rescale_betas_zero_snr",
    "set_alpha_to_one": "set_alpha_to_one",
    "steps_offset": "steps_offset",
    "timestep_spacing": "timestep_spacing",
    "time_convention": "time_convention",
}
"""Options -> fields of DiffusionConfig."""


def run(arguments: argparse.Namespace) -> None:
    given = {"num_heads": arguments.heads, "top_k": arguments.top_k}
    weights = read_weights(
        arguments.file,
        ema=not arguments.plain,
        variant=arguments.variant,
        scheduler=read_scheduler(arguments.scheduler) if arguments.scheduler else None,
        **{k: v for k, v in given.items() if v is not None},
    )
    sections = dict(weights.sections)
    sections["task"] = arguments.task or sections.get("task", "class")
    if diffusion := _diffusion(arguments, weights):
        sections["diffusion"] = diffusion
    if arguments.fit:
        sections["fits"] = as_section({task: Fit(how=arguments.fit) for task in fits_of({}, "")})
    own, left_out = sections.get("vae") or {}, ""
    if arguments.vae:
        vae = load_vae(arguments.vae, latent_channels=weights.config.in_channels)
        sections["vae"] = dataclasses.asdict(vae.record)
    elif own.get("name") and "sha256" not in own:  # a diffusers pipeline's
        try:
            sections["vae"] = dataclasses.asdict(load_vae(own["name"], latent_channels=weights.config.in_channels).record)
        except UserError as error:
            left_out = f"  the pipeline's own vae is left out: {error}"
            del sections["vae"], weights.sections["vae"]
    print(f"{export_weights(weights, arguments.out, sections=sections)}: {weights.source}, task {sections['task']}")
    if "diffusion" in sections:
        print(f"  objective: {describe(sections['diffusion'], str(arguments.out))}")
    if left_out:
        print(left_out)
    for name, option in {"diffusion": "--objective or --scheduler", "vae": "--vae"}.items():
        if name not in sections:
            print(f"  its {name} is not known; give it with {option} before predicting with it")


def _diffusion(arguments: argparse.Namespace, weights: Weights) -> dict[str, Any]:
    """The weights' "diffusion" section with the options over it; empty if neither tells what they predict."""
    known = weights.sections.get("diffusion")
    options = {field: getattr(arguments, name) for name, field in _FIELDS.items() if getattr(arguments, name) is not None}
    if known is None and not options and not arguments.schedule:
        return {}
    if known is None and "prediction_type" not in options:
        raise UserError(f"{arguments.file}: does not tell what it predicts; give --objective or --scheduler beside the others.")
    config = section_from_dict(DiffusionConfig, known or {}, str(arguments.file), prefix="diffusion")
    if known is None and options.get("prediction_type") == "rectified_flow" and weights.source == "public DiT-MoE":
        options.setdefault("time_convention", "fraction")
    if arguments.schedule:
        config = config.with_schedule(arguments.schedule)
    return dataclasses.asdict(dataclasses.replace(config, **options))
