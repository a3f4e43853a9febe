"""Load stored weights as a network ready to predict, and open the device that it runs on."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from dpt import target_codes, tasks
from dpt.config.recipe import section_from_dict
from dpt.config.sections import DiffusionConfig, ModelConfig
from dpt.data.codec import VAECodec, load_vae
from dpt.errors import UserError
from dpt.fits import Fit, fits_of
from dpt.models.pretrained import read_weights
from dpt.models.weights import Weights


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A trained network and everything needed to use it."""

    network: nn.Module
    """`DiT`."""
    model: ModelConfig
    diffusion: DiffusionConfig
    task: str
    """Task it was trained for, or "generalist"."""
    codec: VAECodec
    codes: Mapping[str, str] = dataclasses.field(default_factory=lambda: target_codes.codes_of({}, ""))
    """Code of its targets, by task (`target_codes.TARGET_CODES`)."""
    depth_prompt: str = tasks.DEPTH_PROMPT
    """Content of depth's second condition in training: one of `tasks.DEPTH_PROMPTS`."""
    fits: Mapping[str, Fit] = dataclasses.field(default_factory=lambda: fits_of({}, ""))
    """Fit of pictures in training (how they were resized), by task."""
    lineage: dict[str, Any] = dataclasses.field(default_factory=dict)


def load_model(
    weights: str | Path, *, vae: str = "", use_ema: bool = True, read: Callable[..., Weights] = read_weights
) -> LoadedModel:
    """Load the network in `weights`, with its objective, task and VAE.

    vae: as in `dpt.data.codec.load_vae`; empty: the one that the weights name. read: reader of the weights, called with `ema`;
    commands pass `dpt.training.export.load_weights`, which also reads checkpoints. UserError if something is missing or not
    implemented, or the VAE is not the one of training.
    """
    found = read(weights, ema=use_ema)
    sections = found.sections
    if "diffusion" not in sections:
        raise UserError(
            f"{weights}: nothing says what these weights predict; import them with dpt import --objective or --scheduler."
        )
    record = sections.get("vae") or {}
    name = vae or record.get("name", "")
    if not name:
        raise UserError(f"{weights}: nothing says which VAE their latents are of; name it (stabilityai/sd-vae-ft-ema for DiT).")
    codec = load_vae(name)
    if difference := codec.record.difference(record):
        raise UserError(f"{weights}: trained on latents of another VAE than {name!r} ({difference}); name the one of training.")
    if codec.latent_channels != found.config.in_channels:
        raise UserError(
            f"{weights}: the network takes latents of {found.config.in_channels} channels, VAE {name!r} makes "
            f"{codec.latent_channels}; name the one of training."
        )
    # Tokens dropped for lack of capacity depend on the batch; predictions must not.
    found = dataclasses.replace(found, config=dataclasses.replace(found.config, capacity_factor=0.0))
    return LoadedModel(
        network=found.build(),
        model=found.config,
        diffusion=_read_diffusion(sections["diffusion"], str(weights)),
        task=sections.get("task", "class"),
        codec=codec,
        codes=target_codes.codes_of(sections, str(weights)),
        depth_prompt=tasks.check_depth_prompt(sections.get("depth_prompt", tasks.DEPTH_PROMPT), str(weights)),
        fits=fits_of(sections, str(weights)),
        lineage=sections.get("lineage") or {},
    )


def _read_diffusion(values: dict[str, Any], source: str) -> DiffusionConfig:
    """The objective that the weights were trained for; UserError if dpt does not know it."""
    hints = get_type_hints(DiffusionConfig)
    for name, value in values.items():
        choices = get_args(hints.get(name))
        if name not in hints or (choices and value not in choices):
            raise UserError(f"{source}: diffusion.{name} = {value!r} is unknown to dpt; these weights cannot be sampled.")
    config: DiffusionConfig = section_from_dict(DiffusionConfig, values, source, prefix="diffusion")
    return config


def open_device(name: "torch.device | str") -> torch.device:
    """Open the named device, such as "cpu" or "cuda:0"; UserError if there is none."""
    try:
        device = torch.device(name)
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # bad names, builds without CUDA, missing devices
        known = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise UserError(f'--device "{name}": there is no such device here; choose one of {known}.') from error
    return device


@contextlib.contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Run a GPU's float32 matrix products and convolutions in TF32 if `precision` is "tf32", else not; CPUs are unaffected."""
    if device.type != "cuda":
        yield
        return
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
