"""Read weights from files: public checkpoints, diffusers' folders and our own exports, recognised by their keys."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpt import hub
from dpt.config.recipe import section_from_dict
from dpt.config.sections import DiffusionConfig, ModelConfig
from dpt.errors import UserError, naming
from dpt.models.diffusers_maps import config_from_diffusers, diffusers_map, embedder_copies
from dpt.models.dit import DiT
from dpt.models.layers import position_table
from dpt.models.schedulers import pipeline_scheduler
from dpt.models.weight_files import (
    CONFIG,
    EMA,
    FORMAT_VERSION,
    PIPELINE_INDEX,
    WEIGHTS,
    read_diffusers_tensors,
    read_json_object,
    read_tensors,
)
from dpt.models.weight_maps import Map, infer_public_config, public_map
from dpt.models.weights import Weights, check_numbers, check_state, expected_shapes, refuse

DEPTH_NETWORK = "DptTransformer2DModel"
"""Class of the network in our pipelines for diffusers (`dpt/publishing/folder`)."""
_SECTIONS = {
    "diffusion": dict,
    "vae": dict,
    "task": str,
    "depth_code": str,
    "flow_code": str,
    "depth_prompt": str,
    "class_names": list,
    "fits": dict,
    "lineage": dict,
}
"""Sections of config.json beside the network."""


def import_weights(path: str | Path, *, ema: bool = True, dtype: torch.dtype = torch.float32, **fields: Any) -> DiT:
    """Return the network whose weights are in `path` (see `read_weights`), on the CPU."""
    return read_weights(path, ema=ema, dtype=dtype, **fields).build()


def read_weights(
    path: str | Path,
    *,
    ema: bool = True,
    dtype: torch.dtype = torch.float32,
    variant: str = "",
    scheduler: DiffusionConfig | None = None,
    **fields: Any,
) -> Weights:
    """Read weights of any known format, under our names.

    `path`: our export (a folder), the folder of a run that has exported, a diffusers folder (of a DiTTransformer2DModel, or of
    a pipeline with one), or a public `.pt` or `.safetensors` file: DiT, DiT-MoE with plain or flash-attention keys, or the
    generalist of "Scaling Properties of Diffusion Models for Perceptual Tasks"; or any of these on the hub
    (`hub:owner/name[/path][@revision]`, `dpt.hub`). `ema`: averaged weights if the file holds both kinds. `dtype`: of the
    result. `variant`: of a diffusers folder's files, such as "fp16". `scheduler`: the objective, overriding what the file
    says. `fields`: of ModelConfig, where a public file's shapes do not show them (num_heads, top_k). Nothing is unpickled but
    tensors. UserError if the format is unknown, or a tensor is missing, unknown, of a wrong shape, or not finite.
    """
    path, place = hub.resolve(path)
    if not (path / CONFIG).is_file() and (path / "weights" / CONFIG).is_file():
        path = path / "weights"  # `path` is a run's folder
    ours = (path / WEIGHTS).is_file() and (path / CONFIG).is_file()
    pipeline = (path / "transformer").is_dir()
    if path.is_dir() and not (path / CONFIG).is_file() and not pipeline:
        raise UserError(f"{path}: neither an export nor a diffusers folder (there is no {CONFIG}); check the path.")
    if variant and (ours or not path.is_dir()):
        raise UserError(f"{path}: no diffusers folder, so it has no variant {variant!r}; leave the variant out.")
    if ours:
        weights = _read_export(path, ema)
    elif path.is_dir():
        weights = _read_diffusers(path / "transformer" if pipeline else path, variant)
        if pipeline and scheduler is None and "diffusion" not in weights.sections:
            scheduler = pipeline_scheduler(path)
    else:
        weights = _read_public(path, ema, fields)
    if scheduler is not None:
        weights = replace(weights, sections={**weights.sections, "diffusion": asdict(scheduler)})
    said = weights.sections.get("vae", {})
    if path.is_dir() and not said.get("name") and (vae := _pipeline_vae(path if pipeline else path.parent, place)):
        weights = replace(weights, sections={**weights.sections, "vae": {**said, "name": vae}})
    if hub.is_hub_name(place):
        lineage = {**weights.sections.get("lineage", {}), "weights": place}
        weights = replace(weights, sections={**weights.sections, "lineage": lineage})
    check_state(weights.config, weights.state, str(path))
    check_numbers(weights.config, weights.state, str(path))
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in weights.state.items()}
    return replace(weights, state=state)


def _read_export(path: Path, ema: bool) -> Weights:
    config = read_config(path)
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            if (file.metadata() or {}).get("export_id") != config.pop("export_id", None):
                raise UserError(f"{path}: {WEIGHTS} and {CONFIG} are of different exports; export the weights again.")
            names = list(file.keys())
            averaged = ema and any(name.startswith(EMA) for name in names)
            plain = [n for n in names if not n.startswith(EMA)]
            # Tensors without an average (counters) are stored once.
            state = {n: file.get_tensor(EMA + n if averaged and EMA + n in names else n) for n in plain}
    except SafetensorError as error:
        raise UserError(f"{path / WEIGHTS}: not a complete safetensors file; export the weights again.") from error
    model = config.pop("model")
    return Weights(config=model, state=state, source="our export", averaged=averaged, sections=config)


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of an exported folder, "model" as a ModelConfig; UserError if this version does not know all of it."""
    file = Path(path) / CONFIG
    config = read_json_object(file)
    if config.pop("format_version", None) != FORMAT_VERSION:
        raise UserError(f"{file}: format_version is not {FORMAT_VERSION}; export the weights with this version of dpt.")
    model = config.get("model")
    _check_sections({name: value for name, value in config.items() if name not in ("model", "export_id")}, file)
    if not isinstance(model, dict) or not model:
        raise UserError(f"{file}: model is {model!r}; it must be the object of the network's fields.")
    model.pop("attention_backend", None)  # stored by older exports; any kernel reads any weights
    return config | {"model": section_from_dict(ModelConfig, model, str(file), prefix="model")}


def _check_sections(sections: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return `sections` unchanged; UserError, naming `file`, if this version does not know all of them."""
    unknown = sorted(sections.keys() - _SECTIONS.keys())
    if unknown:
        raise UserError(f"{file}: this version of dpt does not know {', '.join(unknown)}; export the weights with it.")
    for name, kind in _SECTIONS.items():
        if name in sections and not isinstance(sections[name], kind):
            raise UserError(f"{file}: {name} is {sections[name]!r}; it must be of type {kind.__name__}.")
    return sections


def _read_diffusers(path: Path, variant: str) -> Weights:
    values = read_json_object(path / CONFIG)
    if values.get("_class_name") == DEPTH_NETWORK:
        return _read_depth_pipeline(path, values)
    if values.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise UserError(f'{path / CONFIG}: _class_name is "{values.get("_class_name")}"; only DiTTransformer2DModel is known.')
    with naming(path / CONFIG):
        config = config_from_diffusers(values)
    file, state = read_diffusers_tensors(path, variant)
    if (table := state.pop("pos_embed.pos_embed", None)) is not None:
        _check_positions(table, config, str(file))
    for name in expected_shapes(config):
        first = state.get(diffusers_map(name, config).names[0])
        for copy in embedder_copies(name, config):
            if copy in state and first is not None and not torch.equal(state[copy], first):
                raise UserError(f"{file}: {copy} differs from block 0's; a network of ours has one embedder for all blocks.")
            state.pop(copy, None)
    return Weights(config=config, state=_convert(state, config, diffusers_map, str(file)), source="diffusers")


def _pipeline_vae(folder: Path, place: str) -> str:
    """A pipeline's own VAE: its folder, or on the hub the part of `place`; empty if there is none."""
    if not (folder / PIPELINE_INDEX).is_file() or not (read_json_object(folder / PIPELINE_INDEX).get("vae") or [None])[-1]:
        return ""
    if not hub.is_hub_name(place):
        return str(folder / "vae")
    name = hub.parse(place)
    beside = name.path.removesuffix("transformer").strip("/")
    return str(replace(name, path=f"{beside}/vae".strip("/")))


def _read_depth_pipeline(path: Path, values: Mapping[str, Any]) -> Weights:
    """The network of a pipeline that `dpt.publishing` wrote: our names, and a config as in our exports."""
    known = values.get("_dpt")
    if not isinstance(known, dict) or not isinstance(known.get("model"), dict) or not isinstance(known.get("sections"), dict):
        raise UserError(f"{path / CONFIG}: _dpt is {known!r}, not what dpt writes there; export the pipeline again.")
    sections = _check_sections(dict(known["sections"]), path / CONFIG)
    config = section_from_dict(ModelConfig, known["model"], str(path / CONFIG), prefix="model")
    _, state = read_diffusers_tensors(path)
    return Weights(config=config, state=state, source="a pipeline of ours", sections=sections)


def _read_public(path: Path, ema: bool, fields: Mapping[str, Any]) -> Weights:
    state, averaged = _select(read_tensors(path), ema)
    if "x_embedder.proj.weight" not in state and "x_embedder.proj.conv_in_1.weight" not in state:
        names = f"its names begin with {', '.join(sorted(state)[:3])}" if state else "it holds no tensors"
        raise UserError(f"{path}: not the weights of a DiT ({names}).")
    with naming(path):
        config = infer_public_config(state, **fields)
    _check_positions(state.pop("pos_embed"), config, str(path))
    flash = "blocks.0.attn.Wqkv.weight" in state
    kind = "generalist" if config.patch_embed_tasks else "DiT-MoE" if config.num_experts else "DiT"
    # DiT's objective is our default; DiT-MoE has weights of several, which no key tells apart.
    sections: dict[str, Any] = {}
    if kind == "DiT":
        sections = {"diffusion": asdict(DiffusionConfig())}
    elif kind == "generalist":
        sections = {
            "task": "generalist",
            "depth_code": "linear",
            "flow_code": "linear_75",
            "depth_prompt": "ground_truth",
            "fits": {"flow": {"fit": "stretch"}},  # as its training pairs were; other tasks keep the aspect
            "diffusion": asdict(DiffusionConfig(beta_schedule="squaredcos_cap_v2")),
        }
    return Weights(
        config=config,
        state=_convert(state, config, public_map(flash), str(path)),
        source=f"public {kind}",
        averaged=averaged,
        sections=sections,
    )


def _select(loaded: dict[str, Any], ema: bool) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a checkpoint with "ema" and "model", or of a file of plain tensors; and whether they are averages."""
    averaged = ema and isinstance(loaded.get("ema"), Mapping)
    for name in ("ema", "model") if averaged else ("model", "module"):
        if isinstance(loaded.get(name), Mapping):
            loaded = dict(loaded[name])
            break
    return {name.removeprefix("module."): t for name, t in loaded.items() if isinstance(t, Tensor)}, averaged


def _check_positions(table: Tensor, config: ModelConfig, source: str) -> None:
    """Our positions are computed, so a stored table must equal them."""
    side = config.input_size // config.patch_size
    expected = position_table(side, side, config.hidden_size)[None]
    tolerance = 1e-5 if table.dtype == torch.float32 else 1e-2
    if table.shape != expected.shape or (table.float() - expected).abs().max() > tolerance:
        raise UserError(f"{source}: pos_embed is not the fixed sin-cos table of {side} x {side} positions, the only one known.")


def _convert(state: dict[str, Tensor], config: ModelConfig, source: Map, path: str) -> dict[str, Tensor]:
    """The tensors under our names; UserError, using the source's names, for any missing, unknown or misshapen one."""
    sources = {name: source(name, config) for name in expected_shapes(config)}
    wanted = {n for s in sources.values() for n in s.names}
    refuse(path, missing=wanted - state.keys(), unknown=state.keys() - wanted)
    wrong = []
    converted: dict[str, Tensor] = {}
    for name, shape in expected_shapes(config).items():
        parts = {n: list(state[n].shape) for n in sources[name].names}
        try:
            converted[name] = sources[name].join(state)
        except RuntimeError:  # parts that do not go together
            wrong.append(f"{', '.join(f'{n} is {s}' for n, s in parts.items())}")
            continue
        if converted[name].shape != shape:
            wrong.append(f"{', '.join(f'{n} is {s}' for n, s in parts.items())}, together not {list(shape)}")
    refuse(path, wrong=wrong)
    return converted
