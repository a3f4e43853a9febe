"""Turn public weights (DiT, DiT-MoE, the released generalist, a diffusers folder) into a folder that every stage loads."""

import argparse
import dataclasses
from pathlib import Path
from typing import get_args

from dpt.config.sections import DiffusionConfig, Task
from dpt.data.codec import load_vae
from dpt.data.manifest import VAERecord
from dpt.models.pretrained import export_weights, read_weights


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help=".pt or .safetensors file, or a diffusers folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--task", choices=get_args(Task), help="what they are for (default: what the file tells, or class)")
    parser.add_argument("--vae", default="", help="VAE of their latents, e.g. stabilityai/sd-vae-ft-ema")
    parser.add_argument("--heads", type=int, help="attention heads, where the shapes do not tell")
    parser.add_argument("--top-k", type=int, help="experts of a token, where the shapes do not tell")
    parser.add_argument("--objective", choices=("epsilon", "v_prediction", "rectified_flow"), help="what they predict")
    parser.add_argument("--plain", action="store_true", help="the plain weights, if the file has averaged ones too")


def run(arguments: argparse.Namespace) -> None:
    given = {"num_heads": arguments.heads, "top_k": arguments.top_k}
    weights = read_weights(arguments.file, ema=not arguments.plain, **{k: v for k, v in given.items() if v is not None})
    sections = dict(weights.sections)
    sections["task"] = arguments.task or sections.get("task", "class")
    if arguments.objective:
        sections["diffusion"] = dataclasses.asdict(DiffusionConfig(prediction_type=arguments.objective))
    if arguments.vae:
        vae = load_vae(arguments.vae, latent_channels=weights.config.in_channels)
        record = VAERecord(
            name=arguments.vae,
            sha256=vae.sha256,
            scaling_factor=vae.scaling_factor,
            latent_channels=vae.latent_channels,
        )
        sections["vae"] = dataclasses.asdict(record)
    print(f"{export_weights(weights, arguments.out, sections=sections)}: {weights.source}, task {sections['task']}")
    for name, option in {"diffusion": "--objective", "vae": "--vae"}.items():
        if name not in sections:
            print(f"  its {name} is not known; give it with {option} before predicting with it")
