"""Read tensors and JSON objects from others' files: safetensors, torch's pickles, and diffusers' folders, split or not."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpt.config.json_text import parse_object
from dpt.errors import UserError

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "weights.safetensors", "config.json"
"""Files of our exports."""
EMA = "ema."
"""Prefix of averaged weights' names in them."""
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
PIPELINE_INDEX = "model_index.json"
"""The file that marks a pipeline's folder and names its parts."""


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; UserError if it is missing, broken, or not an object."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a JSON object ({error}).") from error
    return parse_object(text, str(file), "what is read here")


def read_tensors(file: Path) -> dict[str, Any]:
    """The names and tensors of a `.safetensors` file or a pickle, of which only tensors and plain containers are read."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's training checkpoints hold their arguments
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such file; check the path.") from error
    except SafetensorError as error:
        raise UserError(f"{file}: not a complete safetensors file; get it again.") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise UserError(
                f"{file}: holds a Python object ({found[1]}), which is never unpickled; save its tensors alone."
            ) from error
        raise UserError(f"{file}: no file of tensors, as torch.save or safetensors write them.") from error
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{file}: damaged, or no file of tensors, as torch.save or safetensors write them.") from error
    if not isinstance(loaded, Mapping):
        raise UserError(f"{file}: holds a {type(loaded).__name__}, not named tensors.")
    return {name: value for name, value in loaded.items() if isinstance(name, str)}


def read_diffusers_tensors(folder: Path, variant: str = "") -> tuple[Path, dict[str, Tensor]]:
    """(The file, or the index of the parts, that was read; its tensors) of a diffusers model's folder.

    `variant`: which of several kinds, such as "fp16"; empty: the plain files, or the only variant present. UserError if
    there is none, or a part is missing.
    """
    found = _weight_files(folder)
    if variant not in found:
        if variant or len(found) != 1:
            there = ", ".join(sorted(name or "plain" for name in found)) or "none"
            asked = f"weights of the variant {variant!r}" if variant else f"{DIFFUSERS_WEIGHTS}.safetensors or .bin"
            raise UserError(f"{folder}: holds no {asked}; there: {there} (dpt import: --variant).")
        (variant,) = found
    file = found[variant]
    if file.suffix != ".json":
        return file, read_tensors(file)
    parts = read_json_object(file).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) and name == Path(name).name for name in parts.values()):
        raise UserError(f"{file}: weight_map does not name the file of each tensor; get the file again.")
    state: dict[str, Tensor] = {}
    for part in sorted(set(parts.values())):
        tensors = read_tensors(folder / part)
        wanted = {name for name, place in parts.items() if place == part}
        if absent := sorted(wanted - tensors.keys()):
            raise UserError(f"{folder / part}: {absent[0]} is missing, which {file.name} places there; get the file again.")
        state |= {name: tensors[name] for name in wanted}
    return file, state


def _weight_files(folder: Path) -> dict[str, Path]:
    """The file or index of each variant ("": the plain one); safetensors before pickles, one file before parts."""
    found: dict[str, Path] = {}
    for kind in ("safetensors", "bin"):
        for pattern in (rf"(?:\.(?P<variant>[\w-]+))?\.{kind}", rf"\.{kind}\.index(?:\.(?P<variant>[\w-]+))?\.json"):
            for file in sorted(folder.glob(f"{DIFFUSERS_WEIGHTS}*")):
                match = re.fullmatch(re.escape(DIFFUSERS_WEIGHTS) + pattern, file.name)
                if match and not re.search(r"-\d+-of-\d+", file.name):
                    found.setdefault(match["variant"] or "", file)
    return found
