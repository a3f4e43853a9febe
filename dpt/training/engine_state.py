"""Copy an engine's state for a checkpoint, and restore it from a checkpoint of any layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpt import distributed
from dpt.errors import UserError
from dpt.training.checkpoint import CheckpointReader, kept_averages, kept_lengths
from dpt.training.deepspeed_internals import scaler_state, set_scaler_state
from dpt.training.engine import Engine
from dpt.training.fragments import fragments, persistent_buffers, refresh_weights


def snapshot(engine: Engine, states: Sequence[str] | None = None) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """This rank's share of the state, copied to the CPU: tensors by "STATE/PARAMETER", and each parameter's [offset, numel].

    `states`: some of the optimizer's states; None: all of them, the weights and the buffers.
    """
    tensors: dict[str, Tensor] = {}
    placed: dict[str, list[int]] = {}
    for fragment in fragments(engine.deepspeed):
        if not fragment.owned:
            continue
        placed[fragment.name] = [fragment.offset, fragment.numel]
        if states is None:
            tensors[f"master/{fragment.name}"] = _copy(fragment.master())
        for state in engine.optimizer.names_of(fragment.flat) if states is None else states:
            tensors[f"{state}/{fragment.name}"] = _copy(fragment.state(engine.optimizer, state))
    if distributed.is_main() and states is None:
        tensors |= {f"buffer/{name}": _copy(buffer) for name, buffer in persistent_buffers(engine.module).items()}
    return tensors, placed


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def engine_state(engine: Engine) -> dict[str, Any]:
    """The rest of the engine's state needed to continue exactly: the update count and the state of the loss-scale search."""
    return {"updates": engine.optimizer.updates, "loss_scaler": scaler_state(engine.loss_scaler)}


@torch.no_grad()
def restore(engine: Engine, checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Set weights, moments, averages, buffers and counters from a verified checkpoint of any layout. Collective.

    Averages are matched by decay; one that the checkpoint lacks starts as its weights. Power-function averages
    are matched by length; UserError for one that it lacks, since its profile reaches back to the run's start.
    """
    optimizer = engine.optimizer
    kept, lengths = kept_averages(state), kept_lengths(state)
    for length in optimizer.ema_lengths.values():
        if length not in lengths:
            raise UserError(
                f"{checkpoint} keeps no average of the relative length {length} (dpt.training.ema_lengths), which must be kept "
                "from a run's start; leave it out, or choose another dpt.training.output_dir."
            )
    sources = {name: kept.get(decay) for name, decay in optimizer.ema_decays.items()}
    sources |= {name: lengths[length] for name, length in optimizer.ema_lengths.items()}
    reader = CheckpointReader(checkpoint, state)
    optimizer.updates = state["engine"]["updates"]
    with distributed.shared_errors():
        for fragment in fragments(engine.deepspeed):
            master = fragment.master()
            reader.read_into(master, "master", fragment.name, fragment.offset)
            optimizer.ensure_state(fragment.flat)["step"].fill_(optimizer.updates)
            for name in optimizer.names_of(fragment.flat):
                source = sources.get(name, name)
                if source is None:
                    fragment.state(optimizer, name).copy_(master)
                else:
                    reader.read_into(fragment.state(optimizer, name), source, fragment.name, fragment.offset)
        for name, buffer in persistent_buffers(engine.module).items():
            buffer.copy_(reader.buffer(name))
    set_scaler_state(engine.loss_scaler, state["engine"]["loss_scaler"])
    refresh_weights(engine.deepspeed)
