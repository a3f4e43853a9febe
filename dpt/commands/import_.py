"""Import public weights (DiT, DiT-MoE, the released generalist, a diffusers folder) as a folder that every stage loads."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, get_args

from dpt.config.numbers import COUNT, NATURAL, POSITIVE, numeric
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
    add = parser.add_argument
    add("file", type=Path, help="a .pt or .safetensors file, a diffusers folder, or hub:owner/name[/path][@revision]")
    add("out", type=Path, help="folder to write")
    add("--task", choices=get_args(Task), help="the weights' task (default: from the file, else class)")
    add("--vae", default="", help="VAE of their latents, e.g. stabilityai/sd-vae-ft-ema")
    add("--heads", type=COUNT, help="attention heads, if shapes do not tell")
    add("--top-k", type=COUNT, help="experts per token, if shapes do not tell")
    add("--variant", default="", help="variant of a diffusers folder's files, e.g. fp16 (default: none)")
    fit = "how training resized pictures (default: stretch for flow of the released generalist, else aspect)"
    add("--fit", choices=FITS, help=fit)
    add("--plain", action="store_true", help="the plain weights, if the file has averaged ones too")
    group = parser.add_argument_group("objective", "overrides --scheduler, which overrides the file")
    add, flag = group.add_argument, argparse.BooleanOptionalAction
    add("--scheduler", type=Path, help="a diffusers scheduler folder, or its scheduler_config.json")
    objectives = ("epsilon", "sample", "v_prediction", "rectified_flow")
    add("--objective", dest="prediction_type", choices=objectives, help="what they predict")
    schedules = ("linear", "scaled_linear", "squaredcos_cap_v2")
    add("--schedule", choices=schedules, help="noise schedule, with its usual betas")
    add("--beta-start", type=numeric(float, POSITIVE), help="first beta of a linear schedule")
    add("--beta-end", type=numeric(float, POSITIVE), help="last beta of a linear schedule")
    rescaled = "betas rescaled so that the last timestep is pure noise"
    add("--zero-terminal-snr", dest="rescale_betas_zero_snr", action=flag, help=rescaled)
    add("--set-alpha-to-one", action=flag, help="DDIM's last step ends at clean latents")
    add("--steps-offset", type=NATURAL, help='added to the timesteps of the spacing "leading"')
    add("--timestep-spacing", choices=("leading", "trailing", "linspace"), help="spacing of a sampler's timesteps")
    time = "timestep t as the network sees it: t, (t + 1) / T or t + 1 (default: fraction for DiT-MoE's rectified flow)"
    add("--time-convention", choices=("index", "fraction", "scaled_fraction"), help=time)


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
    elif own.get("name") and "sha256" not in own:  # from a diffusers pipeline
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
    """The weights' "diffusion" section overridden by the options; empty if neither says what the weights predict."""
    known = weights.sections.get("diffusion")
    fields = {field.name for field in dataclasses.fields(DiffusionConfig)}
    options = {name: value for name, value in vars(arguments).items() if name in fields and value is not None}
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
