"""Read weights from a checkpoint of any layout, file by file; needs neither DeepSpeed nor the ranks that wrote it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpt import distributed
from dpt.config.recipe import DptConfig, section_from_dict
from dpt.config.sections import ModelConfig
from dpt.data.manifest import VAERecord
from dpt.errors import UserError
from dpt.fits import Fit, as_section
from dpt.models.exporting import export_weights
from dpt.models.pretrained import read_weights
from dpt.models.weights import Weights
from dpt.training.checkpoint import (
    STATE_NAME,
    CheckpointReader,
    DamagedCheckpoint,
    check_file,
    find_checkpoints,
    kept_averages,
    read_state,
)
from dpt.training.fragments import of_network
from dpt.training.outputs import CHECKPOINTS
from dpt.training.rebuilding import rebuild


def weights_sections(
    config: DptConfig,
    vae: VAERecord,
    lineage: dict[str, Any],
    *,
    codes: Mapping[str, str] | None = None,
    depth_prompt: str = "",
    class_names: Sequence[str] = (),
    fits: Mapping[str, Fit] | None = None,
) -> dict[str, Any]:
    """Sections of exported weights' `config.json` beside the network: objective, VAE and task, and, where training used
    them, how targets were coded and pictures resized (`codes`, `fits`, by task), what depth's
    second condition showed, and the classes."""
    return {
        "diffusion": dataclasses.asdict(config.diffusion),
        "vae": dataclasses.asdict(vae),
        "task": config.task,
        "lineage": lineage,
        **{f"{task}_code": code for task, code in (codes or {}).items()},
        **({"depth_prompt": depth_prompt} if depth_prompt else {}),
        **({"class_names": list(class_names)} if class_names else {}),
        **({"fits": as_section(fits)} if fits else {}),
    }


def export(checkpoint: str | Path, out: str | Path, *, ema_decay: float | None = None, ema_length: float | None = None) -> Path:
    """Write a checkpoint's weights, plain and averaged, as the folder `out` that evaluation and the next stage load.

    `checkpoint`: a `step_...` folder, or a folder of these (or of a run), whose newest is used. `ema_decay`: the average to
    export, one of its `dpt.training.ema_decays`; None: the first. `ema_length`: instead an average of this relative length,
    built from the run's snapshots (`dpt.training.rebuilding`). UserError if something is damaged or there is no such average.
    """
    folder = resolve_checkpoint(Path(checkpoint))
    if ema_length is not None:
        averaged = rebuilt_weights(folder, ema_length)
    else:
        averaged = checkpoint_weights(folder, ema=True, ema_decay=ema_decay)
    plain = checkpoint_weights(folder, ema=False, check=False)
    ema = averaged.state if averaged.averaged else None
    return export_weights(plain, out, ema=ema, sections=averaged.sections)


def rebuilt_weights(checkpoint: Path, length: float) -> Weights:
    """A checkpoint's weights averaged with the relative length `length`; "lineage" records it and the residual."""
    plain = checkpoint_weights(checkpoint, ema=False)
    averages, residual = rebuild(checkpoint, length)
    lineage = plain.sections["lineage"] | {"ema_length": length, "ema_residual": residual}
    sections = {**plain.sections, "lineage": lineage}
    return dataclasses.replace(plain, state=plain.state | averages, averaged=True, sections=sections)


def load_weights(path: str | Path, *, ema: bool) -> Weights:
    """Load weights to start from: of a checkpoint (or a run's folder of them), or of any format that `read_weights` knows.

    Collective. Rank 0 chooses the checkpoint: a run in progress may have written another before a late rank looks.
    """
    folder, chosen = Path(path), None
    with distributed.shared_errors():
        if distributed.is_main() and folder.is_dir() and not (folder / "config.json").is_file() and is_checkpoint(folder):
            chosen = resolve_checkpoint(folder)
    chosen = distributed.broadcast_object(chosen)
    return read_weights(path, ema=ema) if chosen is None else checkpoint_weights(chosen, ema=ema)


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a checkpoint or holds checkpoints."""
    return (folder / STATE_NAME).is_file() or bool(find_checkpoints(folder) or find_checkpoints(folder / CHECKPOINTS))


def resolve_checkpoint(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the newest one in it. UserError if there is none."""
    if (folder / STATE_NAME).is_file():
        return folder
    found = find_checkpoints(folder) or find_checkpoints(folder / CHECKPOINTS)
    if not found:
        raise UserError(f"{folder}: there is no complete checkpoint; name a run's folder or one of its step_... folders.")
    return found[0]


def checkpoint_weights(checkpoint: Path, *, ema: bool, ema_decay: float | None = None, check: bool = True) -> Weights:
    """Load all weights of a checkpoint, float32, experts stacked by global id. `check`: hash its files first.

    `ema`: averaged ones, by the decay `ema_decay` (None: the first of `dpt.training.ema_decays`); plain ones if the run kept
    none. UserError as for `export`.
    """
    try:
        state = read_state(checkpoint)
        if check:
            for name, entry in state["files"].items():
                check_file(checkpoint / name, entry)
        reader = CheckpointReader(checkpoint, state)
        average = _average(checkpoint, state, ema_decay)
        kind = (average if ema else None) or "master"
        shapes = {name: shape for name, shape in state["parameters"].items() if of_network(name)}
        tensors = {name: reader.whole(kind, name, shape) for name, shape in shapes.items()}
        tensors |= {name: reader.buffer(name) for name in state["buffers"]}
    except DamagedCheckpoint as error:
        before = [path for path in find_checkpoints(checkpoint.parent) if path.name < checkpoint.name]
        fix = f"the one before it is {before[0]}" if before else "there is none before it"
        raise UserError(f"{error}; {fix}.") from error
    model = section_from_dict(ModelConfig, state["recipe"]["dpt"]["model"], str(checkpoint))
    return Weights(config=model, state=tensors, source="our checkpoint", averaged=kind != "master", sections=state["sections"])


def _average(checkpoint: Path, state: dict[str, Any], decay: float | None) -> str | None:
    """The optimizer state that holds the average of this decay (None: the first); None if its decay is 0."""
    decays = state["recipe"]["dpt"]["training"]["ema_decays"]
    if decay is not None and decay not in decays:
        raise UserError(f"{checkpoint} keeps averages of the decays {decays}, none of {decay}; choose one of them.")
    return kept_averages(state).get(decays[0] if decay is None else decay)
