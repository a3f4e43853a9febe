"""Write weights to files: our exports, and diffusers' folders."""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models.diffusers_maps import config_to_diffusers, diffusers_map, embedder_copies
from dpt.models.dit import DiT
from dpt.models.mup import standard
from dpt.models.weight_files import CONFIG, DIFFUSERS_WEIGHTS, EMA, FORMAT_VERSION, WEIGHTS
from dpt.models.weights import Weights, check_state

_log = logging.getLogger(__name__)


def export_weights(
    weights: Weights | DiT,
    path: str | Path,
    *,
    format: Literal["dpt", "diffusers"] = "dpt",
    ema: Mapping[str, Tensor] | None = None,
    sections: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Path:
    """Write the folder `path` completely or not at all; an existing export there is replaced. Tensors keep their dtypes.

    `weights`: a network on one device, or Weights. `ema`: averaged weights under the same names.

    "dpt": `weights.safetensors`, with averaged weights beside the plain ones, and `config.json`. `sections`: what it
    says beside "model" (diffusion, vae, task, lineage, as in docs/architecture.md), over what `weights` carries.

    "diffusers": a DiTTransformer2DModel with the averaged weights if given; UserError if diffusers has no such
    network (experts, task convolutions, CLIP projection, qk-norm). It computes the same at the network's input_size (at others
    diffusers squeezes the positions), unless timestep_features is "dit": diffusers' sines are at 10000^(-i/127), DiT's at
    10000^(-i/128), and its config cannot say so. A warning then gives the line of code that fixes the loaded model, unless
    `quiet`.
    """
    if isinstance(weights, DiT):
        weights = Weights(config=weights.config, state=weights.state_dict())
    path = Path(path)
    check_state(weights.config, weights.state, str(path))
    if ema is not None:
        check_state(weights.config, {**weights.state, **ema}, f"{path}, averaged")
    if format == "diffusers":
        return _write_diffusers(weights.config, {**weights.state, **(ema or {})}, path, quiet)
    tensors = dict(weights.state)
    if ema is not None:
        tensors |= {EMA + name: tensor for name, tensor in ema.items()}
    export_id = uuid.uuid4().hex
    config = {"format_version": FORMAT_VERSION, "export_id": export_id, "model": asdict(weights.config)}
    config |= {**weights.sections, **(sections or {})}
    return _write_folder(path, config, tensors, WEIGHTS, {"export_id": export_id, "format": "pt"})


def _write_diffusers(config: ModelConfig, state: Mapping[str, Tensor], path: Path, quiet: bool) -> Path:
    config, state = standard(config, state)  # diffusers knows no muP
    values = config_to_diffusers(config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensors |= diffusers_map(name, config).split(tensor)
        tensors |= {copy: tensor.clone() for copy in embedder_copies(name, config)}
    _write_folder(path, values, tensors, f"{DIFFUSERS_WEIGHTS}.safetensors", {"format": "pt"})
    if config.timestep_features == "dit" and not quiet:
        _log.warning(
            "%s: diffusers computes the timestep's frequencies otherwise than DiT; after loading, run `for block in "
            "model.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0`, or predictions differ.",
            path,
        )
    return path


def _write_folder(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, metadata: dict[str, str]
) -> Path:
    """Write a folder of config.json and tensors, completely or not at all."""
    if path.exists() and not (path / CONFIG).is_file():
        raise UserError(f"{path}: exists and holds no weights; choose another folder.")
    with new_folder(path) as new:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, new / name, metadata)
        (new / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for file in (new / name, new / CONFIG, new):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path` to write in. On success it replaces `path`; on failure it is removed and `path` stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
