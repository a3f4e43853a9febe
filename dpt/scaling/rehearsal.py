"""A study scaled down: the same launches on tiny networks, on tiny data sets in native layouts or on its own shards.

It finds within minutes what would break a study of days. Its figures say nothing about networks, and are marked as such.
"""

import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpt import hub
from dpt.config.sections import ModelConfig
from dpt.data.manifest import MANIFEST_NAME
from dpt.errors import UserError
from dpt.scaling.compute import WEIGHTS_STEP
from dpt.scaling.launching import count_devices
from dpt.scaling.processes import start_forked, start_fresh
from dpt.scaling.shard_sets import encode_command
from dpt.scaling.study import Launch, Study
from dpt.urls import is_url

WATERMARK = "REHEARSAL"
_SMALLER = 8
"""How much smaller pictures and latents are."""
_BATCH = 2
"""Samples per step on each device."""
_NATIVE_SAMPLES = 8
"""Samples in each split of a data set."""
_SCORED = 2
"""Images that an evaluation scores."""
_CHECKPOINT = re.compile(r"checkpoints/step_(\d+)$")
_PUBLIC = {
    "weights/DiT-XL-2-256x256.pt": "ds_configs/dense_xl2_256.json",
    "weights/DiT-XL-2-512x512.pt": "ds_configs/dense_xl2_512.json",
}
"""Public weights, and the recipe whose untrained network stands in for them."""


def rehearsal_of(study: Study, folder: Path, *, devices: int) -> Study:
    """The study scaled down, all that it writes within `folder`, for launches on `devices` devices each (0: on the CPU).

    The paper's shard sets are replaced by tiny ones; a study that reads others reads all of its own.

    Raises:
        UserError: shards are not there that cannot be made here, or weights that cannot be replaced.
    """
    shards = [needed for needed in study.needs if needed not in _PUBLIC]
    own = not all(map(encode_command, shards)) or any(is_url(p) for launch in study.launches for p in _data(launch))
    if own and (missing := [place for place in shards if not (Path(place) / MANIFEST_NAME).exists()]):
        raise UserError(
            f"{study.path}: {missing[0]} is not a shard folder that is here. A rehearsal makes the paper's shard sets, and "
            "networks in place of the public weights; other sets are read as they are."
        )
    by_name = {launch.name: launch for launch in study.launches}
    untrained = {needed: _untrained(study, needed, folder, devices, own) for needed in study.needs if needed in _PUBLIC}
    read_too = [place for launch in untrained.values() for place in launch.resolved.dpt.data.shards]
    launches = [_shrunk(launch, by_name.get(launch.parent), untrained, folder, devices, own) for launch in study.launches]
    return replace(
        study,
        output=_within(folder, study.output),
        launches=[*untrained.values(), *launches],
        needs=list(dict.fromkeys([*(needed if own else str(folder / needed) for needed in shards), *read_too])),
    )


def make_shards(studies: Sequence[Study], folder: Path, *, say: Callable[[str], None]) -> None:
    """Write the data sets of rehearsals in their native layouts, and encode them with the commands of docs/reproduce.md.

    Existing ones are kept. UserError, with the command, if one fails.
    """
    log = folder / "log.txt"
    folder.mkdir(parents=True, exist_ok=True)
    for place in dict.fromkeys(needed for study in studies for needed in study.needs):
        if (Path(place) / "manifest.json").exists():
            continue
        words = shlex.split(encode_command(str(Path(place).relative_to(folder))))[3:]
        given = dict(itertools.pairwise(words))
        name, side = given["--dataset"], int(given["--resolution"])
        if not (folder / "native" / name).exists():
            sizes = ["--out", str(folder / "native"), "--samples", str(_NATIVE_SAMPLES)]
            _python(["-m", "data_tools.native", name, *sizes], log, say)
        if "CLIP" in words and not (folder / "clip").exists():
            _make_clip(folder / "clip")
        places = {f"DIR/{name}": str(folder / "native" / name), "CLIP": str(folder / "clip")}
        smaller = ["--resolution", str(side // _SMALLER), "--vae", "embedded", "--out", place, "--samples-per-shard", "4"]
        words = [places.get(word, word) for word in words]
        _python(["-m", "data_tools.encode", *words, *smaller, "--processes", "0"], log, say)


def _python(words: list[str], log: Path, say: Callable[[str], None]) -> None:
    say(f"  $ {shlex.join(['python', *words])}")
    log.unlink(missing_ok=True)
    start = start_forked if count_devices() == 0 else start_fresh
    process = start([sys.executable, *words], log, dict(os.environ))
    process.wait()
    if process.exit_code() != 0:
        reason = (log.read_text(encoding="utf-8").strip() or "no message").splitlines()[-1]
        raise UserError(f"{shlex.join(['python', *words])} ended with exit code {process.exit_code()}: {reason}")


def _make_clip(folder: Path) -> None:
    """A tiny untrained CLIP image tower whose embeddings are as wide as those of ViT-L/14."""
    try:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    except ImportError as error:
        raise UserError(
            "amodal sets are encoded with CLIP, which needs the package transformers; install dpt[clip]."
        ) from error
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, projection_dim=768, image_size=32, patch_size=16)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)


def _data(launch: Launch) -> list[str]:
    """The shards that a launch trains on or scores."""
    config = launch.resolved.dpt
    return config.evaluation.data if launch.launcher == "evaluate" else config.data.shards


def _within(folder: Path, path: Path | str) -> Path:
    """The place in the rehearsal's folder that stands in for a path."""
    path = Path(path)
    return folder / path.relative_to(path.anchor)


def _untrained(study: Study, weights: str, folder: Path, devices: int, own: bool) -> Launch:
    """The launch that exports an untrained network instead of public weights."""
    name = f"untrained_{Path(weights).stem}"
    place = study.output / name
    fields: dict[str, Any] = {"training.steps": 0, "training.output_dir": str(place), "tracking.enabled": False}
    launch = Launch(
        name=name, stage="untrained", launcher="pretrain", recipe=_PUBLIC[weights], fields=fields, values={}, folder=place
    )
    small = _shrunk(launch, None, {}, folder, devices, own=False)
    depth = launch.resolved.dpt.model.depth
    return replace(small, fields=small.fields | {"model.depth": depth}) if own else small


def _shrunk(
    launch: Launch, parent: Launch | None, untrained: dict[str, Launch], folder: Path, devices: int, own: bool
) -> Launch:
    """A launch on tiny networks and data (its own data if `own`), within the rehearsal's folder; everything else unchanged."""
    config = launch.resolved.dpt
    fields = launch.fields | {"tracking.offline": True} | ({} if own else {"data.vae": "embedded"})

    def places(shards: Sequence[str]) -> list[str]:
        return list(shards) if own else [str(_within(folder, place)) for place in shards]

    home = "evaluation" if launch.launcher == "evaluate" else "training"
    fields[f"{home}.output_dir"] = str(_within(folder, launch.folder))
    if home == "evaluation":
        fields |= {"evaluation.data": places(_data(launch)), "evaluation.max_samples": _SCORED}
    else:
        fields |= _training_fields(launch, devices, own) | {"data.shards": places(_data(launch))}
        if config.validation.every:
            fields |= {
                "validation.data": places(config.validation.data or config.evaluation.data),
                "validation.max_samples": _SCORED,
            }
    weights, name = getattr(config, home).weights, launch.parent
    if weights in untrained:
        name = untrained[weights].name
        fields[f"{home}.weights"] = str(untrained[weights].folder / "weights")
    elif hub.is_hub_name(weights):
        raise UserError(f"{launch.name}: {weights} cannot be rehearsed; only the paper's shard sets and public weights can.")
    elif weights:
        found = _CHECKPOINT.search(weights)
        if found and parent is not None:
            step = int(found[1]) // _unit(parent)
            weights = f"{weights[: found.start()]}checkpoints/step_{step:08d}"
            fields["tracking.tags"] = fields["tracking.tags"] | {WEIGHTS_STEP: str(step)}
        fields[f"{home}.weights"] = str(_within(folder, weights))
    return replace(launch, fields=fields, folder=_within(folder, launch.folder), parent=name)


def _training_fields(launch: Launch, devices: int, own: bool) -> dict[str, Any]:
    """Sizes of a training run that replace the launch's own."""
    recipe = launch.resolved
    training, unit = recipe.dpt.training, _unit(launch)
    fields = _model_fields(recipe.dpt.model, own) | {
        "train_batch_size": _BATCH * max(1, devices),
        "train_micro_batch_size_per_gpu": _BATCH,
        "training.steps": -(-training.steps // unit),
        "training.warmup_steps": min(training.warmup_steps, 1),
        "training.keep_every": 1 if training.keep_every else 0,
        "training.checkpoint_every": 1 if training.keep_every else 0,
        "training.log_every": 1,
        "training.ep_size": 1,
        "sampling.every": 0,
        "sampling.num_inference_steps": 2,
    }
    if devices == 0:
        fields["training.compile"] = False
        fields |= {f"{name}.enabled": False for name in ("bf16", "fp16") if name in recipe.deepspeed}
    return fields


def _model_fields(model: ModelConfig, own: bool) -> dict[str, Any]:
    """A network whose width still grows with the true one; of two blocks, but for a study's own data, where fields may name
    blocks."""
    width = 16 * max(1, model.hidden_size // 256)
    fields: dict[str, Any] = {"model.hidden_size": width, "model.num_heads": width // 16}
    if not own:
        fields |= {"model.depth": 2, "model.input_size": model.input_size // _SMALLER}
    if model.shared_expert_width:
        fields["model.shared_expert_width"] = width * model.shared_expert_width // model.hidden_size
    return fields


def _unit(launch: Launch) -> int:
    """Training steps that one step of the rehearsal stands for: those between the checkpoints kept, or half of all."""
    training = launch.resolved.dpt.training
    return training.keep_every if 0 < training.keep_every < training.steps else max(1, training.steps // 2)
