"""Locate DeepSpeed's float32 master weights and optimizer states in terms of the model's own parameters.

Each of DeepSpeed's optimizers flattens and partitions in its own way. Here a rank's share of any of them is a list of
fragments: runs of consecutive elements of a parameter that all layouts name and number alike. Experts count as slices of the
parameter that stacks all experts, so that expert parallelism is just one more partition.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpt.training import deepspeed_internals as internals

PREFIX = "network."
"""Prefix of the network's parameter names inside the module that DeepSpeed trains (`dpt.training.step.LossModule`)."""
BESIDE = "alignment."
"""Prefix of the names of parameters trained beside the network's (`dpt.training.alignment.Projectors`)."""


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements `offset : offset + numel` of the flattened parameter `name`, whose masters are `flat[start : start + numel]`."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole parameter, all experts included."""
    offset: int
    numel: int
    flat: Tensor
    """The tensor that the optimizer updates, which is also the key of its state."""
    start: int
    owned: bool
    """Whether this rank writes it; replicas on other ranks do not."""

    def master(self) -> Tensor:
        """The float32 weights, a view [numel]."""
        return self._view(self.flat)

    def state(self, optimizer: Any, name: str) -> Tensor:
        """The optimizer state `name` of these weights, a view [numel]."""
        return self._view(optimizer.ensure_state(self.flat)[name])

    def _view(self, tensor: Tensor) -> Tensor:
        return tensor.detach().view(-1).narrow(0, self.start, self.numel)


def parameter_layout(module: nn.Module) -> dict[str, tuple[nn.Parameter, tuple[int, ...], int]]:
    """Each trained parameter by name, with the shape of the whole (all experts) and where the part held here begins in it."""
    first_expert: dict[int, Any] = {
        id(p): (layer.first_expert, layer.num_experts)
        for layer in module.modules()
        if hasattr(layer, "first_expert")
        for p in layer.experts.parameters()  # type: ignore[union-attr]
    }
    layout = {}
    for name, parameter in module.named_parameters():
        shape = internals.whole_shape(parameter)
        offset = 0
        if id(parameter) in first_expert:
            first, num_experts = first_expert[id(parameter)]
            offset = first * (parameter.numel() // shape[0])
            shape = (num_experts, *shape[1:])
        layout[name.removeprefix(PREFIX)] = (parameter, shape, offset)
    return layout


def of_network(name: str) -> bool:
    """Whether the trained parameter `name` is one of the network's, which exported weights hold."""
    return not name.startswith(BESIDE)


def parameter_shapes(module: nn.Module) -> dict[str, list[int]]:
    """The shape of each trained parameter, all experts included."""
    return {name: list(shape) for name, (_, shape, _) in parameter_layout(module).items()}


def fragments(engine: Any) -> list[Fragment]:
    """This rank's fragments of every parameter, for any ZeRO stage and precision."""
    optimizer = engine.optimizer
    layout = parameter_layout(engine.module)
    if engine.zero_optimization_stage() == 3:
        return list(_partitioned_parameters(optimizer, layout))
    groups = internals.flat_groups(optimizer)
    if groups is not None:
        return list(_partitioned_groups(groups, layout))
    masters: dict[int, Tensor] = {id(p): p for p in engine.module.parameters()}
    masters |= {id(low): high for low, high in internals.master_copies(optimizer)}
    owned = torch.distributed.get_rank() == 0
    return [
        Fragment(name=name, shape=shape, offset=0, numel=p.numel(), flat=masters[id(p)], start=0, owned=owned)
        for name, (p, shape, _) in layout.items()
    ]


def _partitioned_groups(groups: list[tuple[list[nn.Parameter], Tensor]], layout: dict[str, Any]) -> Iterator[Fragment]:
    """Fragments of ZeRO 1 and 2 (and 1 with float32 accumulation): each group of parameters is one flat tensor, cut by rank."""
    flat_of = {id(p): flat for group, flat in groups for p in group}
    for name, (parameter, shape, first) in layout.items():
        place = internals.place_in_group(parameter, flat_of[id(parameter)])
        if place is not None:
            yield _fragment(name, shape, place, first)


def _partitioned_parameters(optimizer: Any, layout: dict[str, Any]) -> Iterator[Fragment]:
    """Fragments of ZeRO 3: each parameter is cut by rank, the last cut padded."""
    for name, (parameter, shape, _) in layout.items():
        place = internals.place_in_partition(optimizer, parameter)
        if place.numel > 0:
            yield _fragment(name, shape, place, 0)


def _fragment(name: str, shape: tuple[int, ...], place: internals.Place, first: int) -> Fragment:
    """Make a fragment. `first`: where the part of the parameter held here begins in the whole."""
    flat, start, offset, numel = place
    return Fragment(name=name, shape=shape, offset=first + offset, numel=numel, flat=flat, start=start, owned=True)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the weights and are the same on all ranks (experts' routing biases)."""
    saved = module.state_dict().keys()
    return {name.removeprefix(PREFIX): buffer for name, buffer in module.named_buffers() if name in saved}


@torch.no_grad()
def refresh_weights(engine: Any) -> None:
    """Update the network's working weights from the master copies. Collective."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        internals.refresh_partitions(optimizer)
    elif internals.flat_groups(optimizer) is not None:
        internals.refresh_groups(optimizer)
    else:
        for low, high in internals.master_copies(optimizer):
            low.data.copy_(high.data)


@torch.no_grad()
def whole_weights(
    engine: Any,
    optimizer: Any,
    state: str,
    *,
    names: Collection[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the network's parameters by name (only `names`): each one's weights (`state` "master") or optimizer state in its
    shape ("ema0"), whole, as `dtype`.

    On every rank, on its device, one parameter at a time. Collective: all ranks go through all of them.
    """
    here = {f.name: f for f in fragments(engine)}
    for name, (_, shape, _) in parameter_layout(engine.module).items():
        if not of_network(name) or (names is not None and name not in names):
            continue
        whole = torch.zeros(torch.Size(shape).numel(), dtype=dtype, device=engine.device)
        fragment = here.get(name)
        if fragment is not None and fragment.owned:
            values = fragment.master() if state == "master" else fragment.state(optimizer, state)
            whole.narrow(0, fragment.offset, fragment.numel).copy_(values)
        torch.distributed.all_reduce(whole)  # one rank's numbers, and zeros
        yield name, whole.view(shape)


def copy_weights(engine: Any, optimizer: Any, state: str, network: nn.Module) -> None:
    """Copy the weights `state` (see `whole_weights`) and the buffers of the trained network into a whole network, or its
    first blocks, keeping the latter's dtype and device. Collective."""
    waiting = network.state_dict()  # shares the network's memory
    dtype = next(network.parameters()).dtype
    for name, whole in whole_weights(engine, optimizer, state, names=set(waiting), dtype=dtype):
        waiting.pop(name).copy_(whole)
    buffers = persistent_buffers(engine.module) if waiting else {}
    for name, target in waiting.items():
        target.copy_(buffers[name])
