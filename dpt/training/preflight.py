"""Before any work: can this recipe run on these ranks with this memory, and if not, which shipped recipe can?"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from dpt import distributed
from dpt.config.checks import batch_split, check_recipe, trained_model
from dpt.config.recipe import Recipe, load_recipe
from dpt.errors import UserError
from dpt.models.costs import Memory, Precision, memory

OVERHEAD_BYTES = 600 * 2**20
"""What a training process holds beside its tensors: the interpreter, libraries, communication buffers."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a recipe asks of a machine."""

    memory: Memory
    """Of a rank's tensors, by the cost model."""
    ranks: int
    """The ranks it is counted for: those given, or as many as expert parallelism needs."""
    missing_shards: list[str]

    @property
    def bytes_per_rank(self) -> int:
        """Of its tensors and its process."""
        return self.memory.total + OVERHEAD_BYTES

    @property
    def plan(self) -> str:
        """What the memory of a rank goes to, in one line."""
        sizes = {field.name.replace("_", " "): getattr(self.memory, field.name) for field in fields(Memory)}
        sizes["process"] = OVERHEAD_BYTES
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items() if size)
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"Memory plan, GiB on each of {ranks}: {parts}; {self.bytes_per_rank / 2**30:.2f} in all."


def needs(recipe: Recipe, stage: str, world_size: int) -> Needs:
    """Memory of a rank by the cost model (`dpt.models.costs.memory`), ranks and shards."""
    training = recipe.dpt.training
    ranks = -(-world_size // training.ep_size) * training.ep_size
    try:
        _, micro, _ = batch_split(recipe, ranks)
    except UserError:  # reported by check_recipe; the memory of one sample a rank is the least that is needed
        micro = 1
    cost = memory(
        trained_model(recipe, stage),
        ranks=ranks,
        ep_size=training.ep_size,
        zero_stage=recipe.zero_stage,
        micro_batch_size=micro,
        precision=cast(Precision, recipe.precision),
        num_emas=sum(decay > 0 for decay in training.ema_decays),
        activation_checkpointing=training.activation_checkpointing,
    )
    missing = [s for s in recipe.dpt.data.shards if "://" not in s and ":" not in s and "{" not in s and not Path(s).is_dir()]
    return Needs(memory=cost, ranks=ranks, missing_shards=missing)


def available_bytes() -> int:
    """Memory that one rank can have: of its GPU, or its share of this machine's free memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    import psutil

    return psutil.virtual_memory().available // distributed.local_world_size()


def preflight(recipe: Recipe, stage: str, world_size: int) -> Needs:
    """What the recipe needs; a UserError that says it, what is here, and which recipe fits instead, if it cannot run here."""
    required, available = needs(recipe, stage, world_size), available_bytes()
    if required.ranks != world_size or required.bytes_per_rank > available:
        shards = ", ".join(recipe.dpt.data.shards) or "none"
        state = f" (missing: {', '.join(required.missing_shards)})" if required.missing_shards else ""
        raise UserError(
            f"{recipe.path}: this machine cannot hold it: it needs {required.bytes_per_rank / 2**30:.1f} GiB on each of "
            f"{required.ranks} rank{'s' if required.ranks > 1 else ''} and the shards {shards}{state}, is meant for "
            f"{recipe.dpt.hardware or 'hardware that it does not name'}, and here are {world_size} "
            f"rank{'s' if world_size > 1 else ''} with {available / 2**30:.1f} GiB each; "
            + _advice(recipe, stage, world_size, available)
        )
    check_recipe(recipe, world_size, stage)
    return required


def _advice(recipe: Recipe, stage: str, world_size: int, available: int) -> str:
    """The largest recipe beside this one that fits: same task, made for such a device and number of ranks."""
    import torch

    fitting: list[tuple[int, str]] = []
    for path in sorted(Path(recipe.path).parent.glob("*.json")):
        try:
            other = load_recipe(path)
            check_recipe(other, world_size, stage)
        except UserError:
            continue
        required, hardware = needs(other, stage, world_size), other.dpt.hardware
        same_device = ("CPU" in hardware) != torch.cuda.is_available()
        same_ranks = str(world_size) in re.findall(r"\d+", hardware)[:1]
        fits = required.ranks == world_size and required.bytes_per_rank <= available
        if fits and same_device and same_ranks and other.dpt.task == recipe.dpt.task:
            fitting.append((required.bytes_per_rank, str(path)))
    if not fitting:
        return f'no recipe beside it for the task "{recipe.dpt.task}" fits.'
    return f"{max(fitting)[1]} fits."
