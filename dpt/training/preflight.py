"""Check before any work whether a recipe can run on these ranks with this memory, and if not, which shipped recipe can."""

import re
import socket
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast

from dpt import distributed
from dpt.config.checks import batch_split, check_recipe, ranks_in_words, trained_model, trains_with_muon
from dpt.config.recipe import Recipe, load_recipe
from dpt.errors import UserError
from dpt.models.costs import num_params
from dpt.models.memory import Memory, Precision, memory, picture_bytes
from dpt.models.recipe_costs import alignment_bytes, alignment_params, decoder_bytes
from dpt.models.vae_costs import vae_config, vae_size

OVERHEAD_BYTES = 600 * 2**20
"""Memory of a training process beside its tensors: the interpreter, libraries, communication buffers."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """A recipe's requirements on a machine."""

    memory: Memory
    """Memory of a rank's tensors, by the cost model."""
    ranks: int
    """The number of ranks assumed: those given, or as many as expert parallelism needs."""
    missing_shards: list[str]
    snapshots: int = 0
    """Maximum disk space, in bytes, of all snapshots of averages."""

    @property
    def bytes_per_rank(self) -> int:
        """Bytes of a rank's device tensors and process."""
        return self.memory.total + OVERHEAD_BYTES

    @property
    def plan(self) -> str:
        """A rank's memory by purpose, in one line."""
        sizes = {field.name.replace("_", " "): getattr(self.memory, field.name) for field in fields(Memory)}
        host = sizes.pop("host")
        sizes["process"] = OVERHEAD_BYTES
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items() if size)
        offloaded = f" and {host / 2**30:.2f} offloaded to the host" if host else ""
        line = f"Memory plan, GiB on each of {ranks_in_words(self.ranks)}: {parts}"
        disk = f" Snapshots of averages take up to {self.snapshots / 2**30:.2f} GiB on the disk." if self.snapshots else ""
        return f"{line}; {self.bytes_per_rank / 2**30:.2f} in all{offloaded}.{disk}"


@dataclass(frozen=True, kw_only=True)
class Available:
    """Memory available to one rank, in bytes."""

    device: int
    """Free memory on its GPU; without GPUs, its share of this machine's free memory."""
    host: int | None
    """Its share of this machine's free memory beside its GPU; None without GPUs."""


def needs(recipe: Recipe, stage: str, world_size: int) -> Needs:
    """Memory of a rank by the cost model (`dpt.models.memory`), and shards. UserError if the batch cannot be split."""
    config = recipe.dpt
    training, model, precision = config.training, trained_model(recipe, stage), cast(Precision, recipe.precision)
    ranks = -(-world_size // training.ep_size) * training.ep_size
    _, micro, _ = batch_split(recipe, ranks)
    pictures = 0
    vae = vae_size(vae_config(config.data.vae))
    if config.task == "class":
        guided = config.sampling.guidance_scale != 1.0
        pictures = picture_bytes(model, vae, guided=guided, precision=precision)
    elif config.validation.every:
        guided, images = config.evaluation.guidance_scale != 1.0, config.evaluation.batch_size
        pictures = picture_bytes(model, vae, images=images, guided=guided, precision=precision)
    zero = recipe.deepspeed.get("zero_optimization", {})
    offload = {part: zero.get(part, {}).get("device") == "cpu" for part in ("offload_optimizer", "offload_param")}
    cost = memory(
        model,
        ranks=ranks,
        ep_size=training.ep_size,
        zero_stage=recipe.zero_stage,
        micro_batch_size=micro,
        precision=precision,
        num_emas=sum(decay > 0 for decay in training.ema_decays) + len(training.ema_lengths),
        activation_checkpointing=training.activation_checkpointing,
        pictures=pictures,
        muon=trains_with_muon(recipe.deepspeed.get("optimizer", {})),
        projector_params=alignment_params(training, model),
        **offload,
    )
    size = 4 if precision == "fp32" else 2
    cost = replace(
        cost,
        alignment=alignment_bytes(training, model, micro_batch_size=micro, size=size),
        decoder=decoder_bytes(config, micro_batch_size=micro, size=size),
    )
    missing = [s for s in config.data.shards if "://" not in s and ":" not in s and "{" not in s and not Path(s).is_dir()]
    snapshots = 4 * len(training.ema_lengths) * training.ema_snapshots * num_params(model).total
    return Needs(memory=cost, ranks=ranks, missing_shards=missing, snapshots=snapshots)


def available() -> Available:
    """Memory available to one rank. Opens a CUDA context where there are GPUs, so `distributed.set_device` comes first."""
    import psutil
    import torch

    host = psutil.virtual_memory().available // distributed.local_world_size()
    if not torch.cuda.is_available():
        return Available(device=host, host=None)
    free, _ = torch.cuda.mem_get_info()
    return Available(device=free, host=host)


def check_ranks(recipe: Recipe, stage: str, world_size: int) -> Needs:
    """The recipe's requirements; UserError, the same on all ranks, if it cannot run as `stage` on `world_size` ranks."""
    check_recipe(recipe, max(world_size, recipe.dpt.training.ep_size), stage)
    required = needs(recipe, stage, world_size)
    if world_size < recipe.dpt.training.ep_size:
        free = available()
        raise UserError(
            f"{_short(recipe, required)}, and here {'is' if world_size == 1 else 'are'} {ranks_in_words(world_size)} with "
            f"{free.device / 2**30:.1f} GiB free; {_advice(recipe, stage, world_size, free)}."
        )
    return required


def check_memory(recipe: Recipe, stage: str, required: Needs, free: Available) -> None:
    """Raise UserError (with `dpt.training.check_memory` "warn": print one line) if a rank has less free memory than it needs.

    `free`: this rank's, measured before it met the others. The message says what is needed, what is free and where, and which
    recipe fits instead. Collective.
    """
    problems = [text for text in distributed.gather_objects(_shortage(recipe, stage, required, free)) if text]
    if not problems:
        return
    if recipe.dpt.training.check_memory == "warn":
        distributed.log(f'Warning: {problems[0]}; going on, since dpt.training.check_memory is "warn".')
        return
    raise UserError(f'{problems[0]}; set dpt.training.check_memory to "warn" to try all the same.')


def _shortage(recipe: Recipe, stage: str, required: Needs, free: Available) -> str:
    """Describe what this rank lacks; empty if nothing."""
    ranks, rank = distributed.world_size(), distributed.rank()
    where = f"rank {rank} on {socket.gethostname()} has" if ranks > 1 else "here is 1 rank with"
    device, host = required.bytes_per_rank, required.memory.host
    if free.host is None:
        device, host = device + host, 0
    if device > free.device:
        advice = _advice(recipe, stage, ranks, free)
        return f"{_short(recipe, required)}, and {where} {free.device / 2**30:.1f} GiB free; {advice}"
    if host > (free.host or 0):
        return (
            f"{recipe.path}: offloading needs {host / 2**30:.1f} GiB of the host's memory for each rank, and {where} "
            f"{(free.host or 0) / 2**30:.1f} GiB free"
        )
    return ""


def _short(recipe: Recipe, required: Needs) -> str:
    """The beginning of a refusal."""
    shards = ", ".join(recipe.dpt.data.shards) or "none"
    state = f" (missing: {', '.join(required.missing_shards)})" if required.missing_shards else ""
    offloaded = f" and {required.memory.host / 2**30:.1f} GiB of host memory" if required.memory.host else ""
    return (
        f"{recipe.path}: this machine cannot hold it: it needs {required.bytes_per_rank / 2**30:.1f} GiB{offloaded} on each of "
        f"{ranks_in_words(required.ranks)} and the shards {shards}{state}, is meant for "
        f"{recipe.dpt.hardware or 'hardware that it does not name'}"
    )


def _advice(recipe: Recipe, stage: str, world_size: int, free: Available) -> str:
    """The largest recipe other than this one that fits: same task, made for such a device and number of ranks."""
    fitting: list[tuple[int, str]] = []
    for path in sorted(Path(recipe.path).parent.glob("*.json")):
        try:
            other = load_recipe(path)
            check_recipe(other, world_size, stage)
        except UserError:
            continue
        required, hardware = needs(other, stage, world_size), other.dpt.hardware
        same_device = ("CPU" in hardware) == (free.host is None)
        same_ranks = str(world_size) in re.findall(r"\d+", hardware)[:1]
        fits = required.ranks == world_size and required.bytes_per_rank <= free.device
        if fits and same_device and same_ranks and other.dpt.task == recipe.dpt.task:
            fitting.append((required.bytes_per_rank, str(path)))
    if not fitting:
        return f'no recipe beside it for the task "{recipe.dpt.task}" fits'
    return f"{max(fitting)[1]} fits"
