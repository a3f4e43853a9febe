"""Write weights as a folder that diffusers opens as a pipeline: DiTPipeline for dense class models, our own for depth."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from dpt import hub
from dpt.config.recipe import section_from_dict
from dpt.config.sections import DiffusionConfig, ModelConfig
from dpt.data.codec import VAECodec, load_vae
from dpt.embedded import EMBEDDED_VAES
from dpt.errors import UserError
from dpt.fits import fits_of
from dpt.models.exporting import export_weights, new_folder
from dpt.models.mup import standard
from dpt.models.pretrained import DEPTH_NETWORK
from dpt.models.schedulers import SCHEDULER_FILE, TAKEN
from dpt.models.weight_files import DIFFUSERS_WEIGHTS, PIPELINE_INDEX
from dpt.models.weights import Weights
from dpt.target_codes import codes_of
from dpt.tasks import label_id

NULL_LABEL = 1000
"""Null (class-free) label in diffusers' DiTPipeline, whatever the number of classes."""
_FILES = Path(__file__).parent / "folder"


def write_pipeline(
    weights: Weights,
    out: Path,
    *,
    source: str,
    vae: str = "",
    include_vae: bool = False,
    class_names: Sequence[str] = (),
    steps: int = 50,
    ensemble: int = 1,
    card: str = "",
) -> Path:
    """Write the folder `out`, completely or not at all; an existing pipeline is replaced.

    Class weights become a DiTPipeline (with `pipeline.py` where the network's timestep frequencies are DiT's); depth weights,
    of specialists and generalists, dense or with experts, a pipeline of files that do not need dpt. `source` names the
    weights in errors. `vae`: as in `dpt.data.codec.load_vae`; empty: the one that the weights name. Depth's is copied if it is
    on this machine or `include_vae`, else named by its commit. `class_names`: empty: those stored in the weights; numbers
    replace missing ones. `steps`, `ensemble`: depth's defaults. `card`: text of README.md. UserError for weights that diffusers
    has no pipeline for.
    """
    if out.exists() and not (out / PIPELINE_INDEX).is_file():
        raise UserError(f"{out}: exists and holds no pipeline; choose another folder.")
    task = weights.sections.get("task", "class")
    if task not in ("class", "depth", "generalist"):
        raise UserError(f"{source}: trained for {task}; pipelines are for class images and depth only: export a dpt folder.")
    if "diffusion" not in weights.sections:
        raise UserError(f"{source}: nothing says what these weights predict; import them with --objective or --scheduler.")
    diffusion = section_from_dict(DiffusionConfig, weights.sections["diffusion"], source, prefix="diffusion")
    codec = _codec(weights, vae, source)
    weights = replace(weights, sections={**weights.sections, "vae": asdict(codec.record)})
    with new_folder(out) as new:
        if task == "class":
            names = class_names or weights.sections.get("class_names", ())
            index = _write_class(weights, new, diffusion, names, source) | _write_vae(scaled_only(codec), new)
        else:
            index = _write_depth(weights, new, diffusion, source) | {"downsampling": codec.downsampling}
            index |= {"default_steps": steps, "default_ensemble_size": ensemble}
            named = hub.is_hub_name(codec.name) and not include_vae
            index |= _name_vae(codec) if named else _write_vae(codec.vae, new)
        scheduler = scheduler_config(diffusion)
        _write_json(new / "scheduler" / SCHEDULER_FILE, scheduler)
        index |= {"scheduler": ["diffusers", scheduler["_class_name"]], "_diffusers_version": diffusers.__version__}
        _write_json(new / PIPELINE_INDEX, index)
        if card:
            (new / "README.md").write_text(card, encoding="utf-8")
    return out


def scheduler_config(diffusion: DiffusionConfig) -> dict[str, Any]:
    """Content of `scheduler_config.json` for the network's objective: DDIM, or flow matching for straight paths."""
    if diffusion.prediction_type == "rectified_flow":
        kind, total = "FlowMatchEulerDiscreteScheduler", diffusion.num_train_timesteps
        return {"_class_name": kind, "num_train_timesteps": total, "shift": 1.0}
    return {"_class_name": "DDIMScheduler", **{n: getattr(diffusion, n) for n in TAKEN}, "clip_sample": False}


def _codec(weights: Weights, vae: str, source: str) -> VAECodec:
    """The VAE of the weights' latents. UserError if none is named or it is not the one of training."""
    record = weights.sections.get("vae") or {}
    name = vae or record.get("name", "")
    if not name:
        raise UserError(f"{source}: nothing says which VAE their latents are of; name it with --vae.")
    codec = load_vae(name, latent_channels=weights.config.in_channels)
    if record.get("sha256", codec.sha256) != codec.sha256:
        raise UserError(f"{source}: trained on latents of another VAE than {name!r}; name the one of training with --vae.")
    return codec


def _name_vae(codec: VAECodec) -> dict[str, Any]:
    """Index entries of a VAE on the hub: its location."""
    name = hub.parse(codec.name)
    place = {"vae_name": name.repo, "vae_revision": name.revision, "vae_subfolder": name.path}
    return {"vae": [None, None], "vae_class": type(codec.vae).__name__, **place}


def _write_vae(vae: Any, folder: Path) -> dict[str, Any]:
    """Copy the VAE to FOLDER/vae; return its index entries."""
    vae.to(memory_format=torch.contiguous_format).save_pretrained(folder / "vae")
    config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # a folder on this machine
    _write_json(folder / "vae" / "config.json", config)
    return {"vae": ["diffusers", config["_class_name"]]}


def scaled_only(codec: VAECodec) -> Any:
    """Return a VAE whose latents are those networks see from `codec`, over the scaling factor: all DiTPipeline supports.

    The shift and per-channel statistics are folded into the 1 x 1 convolutions after the encoder and before the decoder,
    which are added if the VAE has none. A VAE with neither shift nor statistics is returned unchanged.
    """
    scaling, record = codec.scaling, codec.record
    if not (record.shift_factor or record.latents_mean or record.latents_std):
        return codec.vae
    channels = record.latent_channels
    std = torch.tensor(record.latents_std or (1.0,) * channels)
    mean = torch.as_tensor(scaling.shift, dtype=torch.float32).flatten().cpu().expand(channels)
    plain = {"shift_factor": None, "latents_mean": None, "latents_std": None}
    config = {**codec.vae.config, **plain, "use_quant_conv": True, "use_post_quant_conv": True}
    vae = type(codec.vae).from_config(config)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in codec.vae.state_dict().items()}
    for name, size in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        state.setdefault(f"{name}.weight", torch.eye(size)[:, :, None, None])
        state.setdefault(f"{name}.bias", torch.zeros(size))
    behind, before = state["quant_conv.weight"].squeeze(), state["post_quant_conv.weight"].squeeze()
    gain = torch.cat([1 / std, torch.ones(channels)])
    offset = torch.cat([-mean / std, -2 * std.log()])  # for the means and the log-variances
    state["quant_conv.weight"] = (gain[:, None] * behind)[:, :, None, None]
    state["quant_conv.bias"] = gain * state["quant_conv.bias"] + offset
    state["post_quant_conv.weight"] = (before * std)[:, :, None, None]
    state["post_quant_conv.bias"] = state["post_quant_conv.bias"] + before @ mean
    vae.load_state_dict(state)
    return vae.eval()


# --- class images ---------------------------------------------------------------------------------------------------------


def _write_class(
    weights: Weights, folder: Path, diffusion: DiffusionConfig, class_names: Sequence[str], source: str
) -> dict[str, Any]:
    if weights.config.num_experts:
        raise UserError(f"{source}: diffusers' DiTPipeline has no experts; export a dpt folder, which `dpt sample` reads.")
    if diffusion.prediction_type == "rectified_flow" or diffusion.time_convention != "index":
        raise UserError(f"{source}: diffusers' DiTPipeline does not sample {diffusion.prediction_type}; export a dpt folder.")
    classes = weights.config.num_classes
    if classes > NULL_LABEL:
        raise UserError(f"{source}: {classes} classes; diffusers' DiTPipeline has {NULL_LABEL} at most, export a dpt folder.")
    if len(class_names) > classes:
        raise UserError(f"{len(class_names)} class names for {classes} classes of {source}; give one for each.")
    export_weights(_with_null_label(weights), folder / "transformer", format="diffusers", quiet=True)
    if weights.config.timestep_features == "dit":
        shutil.copyfile(_FILES / "pipeline_classes.py", folder / "pipeline.py")
    return {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "id2label": dict(enumerate([*class_names, *map(str, range(len(class_names), classes))])),
    }


def _with_null_label(weights: Weights) -> Weights:
    """The same network with its null label where DiTPipeline expects it; labels in between are null labels too."""
    name, missing = "y_embedder.embedding_table.weight", NULL_LABEL - weights.config.num_classes
    table = weights.state[name]
    table = torch.cat([table, table[-1:].expand(missing, -1)])
    return replace(weights, config=replace(weights.config, num_classes=NULL_LABEL), state={**weights.state, name: table})


# --- depth ----------------------------------------------------------------------------------------------------------------


def _write_depth(weights: Weights, folder: Path, diffusion: DiffusionConfig, source: str) -> dict[str, Any]:
    if weights.config.clip_embedding_size:
        raise UserError(f"{source}: takes CLIP embeddings, which the depth pipeline does not support; export a dpt folder.")
    if diffusion.prediction_type == "rectified_flow" and diffusion.steps_offset:
        raise UserError(f"{source}: steps_offset {diffusion.steps_offset} on straight paths, which no pipeline walks.")
    config, state = standard(weights.config, weights.state)
    known = {"task": "depth", **weights.sections}
    fit = fits_of(weights.sections, source)["depth"]
    _write_network(config, state, folder / "transformer", known)
    shutil.copyfile(_FILES / "pipeline.py", folder / "pipeline.py")
    learnt = ("prediction_type", "time_convention", "timestep_spacing", "one_step", "initial_noise")
    return {
        "_class_name": ["pipeline", "DptDepthPipeline"],
        "transformer": ["dpt_transformer", DEPTH_NETWORK],
        "num_conditions": config.num_conditions,
        "fit": fit.whole,
        "fit_resolution": fit.resolution,
        "label": label_id("depth", trained_task=known["task"], num_classes=config.num_classes),
        "depth_code": codes_of(weights.sections, source)["depth"],
        **{name: getattr(diffusion, name) for name in learnt},
    }


def _write_network(config: ModelConfig, state: dict[str, Tensor], folder: Path, sections: dict[str, Any]) -> None:
    """Write the network, its config, and its code: diffusers looks for a component's class in the component's folder.

    The config also holds dpt's metadata, under a name that diffusers ignores, so that dpt can read such folders.
    """
    folder.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / f"{DIFFUSERS_WEIGHTS}.safetensors", {"format": "pt"})
    shutil.copyfile(_FILES / "dpt_transformer.py", folder / "dpt_transformer.py")
    same: tuple[str, ...] = ("patch_size", "hidden_size", "num_heads", "num_classes", "mlp_width", "mlp_norm_eps", "qk_norm")
    same += ("timestep_features", "num_experts", "top_k", "expert_activation", "router_gate", "normalize_top_k")
    same += ("shared_expert_width", "mlp_kernel_size")
    values = {
        "_class_name": DEPTH_NETWORK,
        "_dpt": {"model": asdict(config), "sections": _without_places(sections)},
        "sample_size": config.input_size,
        "in_channels": config.in_channels * (1 + config.num_conditions),
        "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
        "num_layers": config.depth,
        "num_input_tasks": config.patch_embed_tasks,
        "router_biased": config.router_bias_balancing,
        **{name: getattr(config, name) for name in same},
    }
    _write_json(folder / "config.json", values)


def _without_places(sections: dict[str, Any]) -> dict[str, Any]:
    """The sections without the VAE's name if that is a folder on this machine."""
    vae = sections.get("vae") or {}
    public = vae.get("name") in EMBEDDED_VAES or hub.is_hub_name(hub.with_prefix(vae.get("name", "")))
    return sections if public else {**sections, "vae": {**vae, "name": ""}}


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
