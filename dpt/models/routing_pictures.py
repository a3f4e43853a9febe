"""Routing reports: which experts get which tokens, by layer, timestep, class and patch position; as arrays and pictures."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from dpt.errors import UserError
from dpt.models.dit import DiT
from dpt.models.moe import Routing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """Routing of all tokens seen. L layers, E experts, h x w tokens of an image; shares sum to 1 over experts (NaN: none)."""

    tokens_per_expert: NDArray[np.int64]
    """[L, E] routed slots."""
    load_entropy: FloatArray
    """[L] entropy of the experts' loads over log E: 1 is even, 0 is one expert for all."""
    token_entropy: FloatArray
    """[L] mean entropy of one token's router probabilities over log E: 0 is certain."""
    share_by_timestep: FloatArray
    """[L, bins, E]."""
    timestep_edges: FloatArray
    """[bins + 1]."""
    share_by_class: FloatArray
    """[L, classes, E]."""
    classes: NDArray[np.int64]
    """[classes] label ids seen."""
    share_by_position: FloatArray
    """[L, h, w, E]."""

    def save(self, folder: str | Path) -> list[Path]:
        """Write `routing.npz` with all arrays and one heat map per question; return the files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "routing.npz", **vars(self))
        edges = [f"{e:.0f}" for e in self.timestep_edges]
        figures = {
            "tokens_per_expert": _heat_map(_shares(self.tokens_per_expert), "expert", "layer", "share of a layer's slots"),
            "share_by_timestep": _per_layer(self.share_by_timestep, "timesteps from", edges[:-1]),
            "share_by_class": _per_layer(self.share_by_class, "class", [str(c) for c in self.classes]),
            "share_by_position": _grid(self.share_by_position.transpose(0, 3, 1, 2)),
        }
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=100)
        return [folder / "routing.npz", *(folder / f"{name}.png" for name in figures)]


@torch.no_grad()
def trace_routing(
    model: DiT,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    num_train_timesteps: int = 1000,
    timestep_bins: int = 10,
    network_time: Callable[[Tensor], Tensor] | None = None,
) -> RoutingReport:
    """Run `model` on batches and report its routing.

    A batch holds the network's arguments by name (noisy_latents, timesteps, labels, ...); latents must be of one size.
    Timesteps are sorted into equal bins of [0, num_train_timesteps); `network_time` gives the network's time input, if not
    the timesteps themselves. UserError if the model has no experts or there is no batch.
    """
    tally = RoutingTally(model, num_train_timesteps=num_train_timesteps, timestep_bins=timestep_bins)
    for batch in batches:
        with tally.watch(batch["timesteps"], batch["labels"], tuple(batch["noisy_latents"].shape[2:])):
            times = batch["timesteps"] if network_time is None else network_time(batch["timesteps"])
            model(**{**batch, "timesteps": times})
    return tally.report()


class RoutingTally:
    """Counts of slots by layer and other keys over the forward passes it watches; kept on their device."""

    def __init__(self, model: DiT, *, num_train_timesteps: int = 1000, timestep_bins: int = 10) -> None:
        """Raise UserError if the model has no experts."""
        self.layers = [block.moe for block in model.blocks if block.moe is not None]
        if not self.layers:
            raise UserError("the model has no experts, so there is no routing to show; give weights of a Mixture-of-Experts.")
        self.config, self.num_train_timesteps = model.config, num_train_timesteps
        device, experts = next(model.parameters()).device, model.config.num_experts

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(len(self.layers), *shape, dtype=torch.int64, device=device)

        self.by_timestep = zeros(timestep_bins, experts)
        self.by_class = zeros(model.config.num_classes + 1, experts)
        self.by_position: Tensor | None = None
        self.entropy, self.tokens = zeros().double(), zeros()

    @contextmanager
    def watch(self, timesteps: Tensor, labels: Tensor, size: tuple[int, ...]) -> Iterator[None]:
        """Count the forward pass in this context: its timesteps [B], labels [B], and (h, w) of its latents.

        A backward pass may follow in the context; what it recomputes is not counted twice.
        """
        seen: dict[int, Routing] = {}
        try:
            for number, layer in enumerate(self.layers):
                layer.observer = partial(_keep_first, seen, number)
            yield
        finally:
            for layer in self.layers:
                layer.observer = None
        self._add(seen, timesteps, labels, tuple(side // self.config.patch_size for side in size))

    @torch.no_grad()
    def _add(self, seen: Mapping[int, Routing], timesteps: Tensor, labels: Tensor, grid: tuple[int, ...]) -> None:
        experts, bins = self.config.num_experts, self.by_timestep.shape[1]
        if self.by_position is None:
            self.by_position = self.by_timestep.new_zeros(len(self.layers), *grid, experts)
        if self.by_position.shape[1:3] != grid:
            raise UserError("the batches hold latents of several sizes; shares by position need one.")
        binned = (timesteps.double() * bins / self.num_train_timesteps).long().clamp(0, bins - 1)
        for number, routing in seen.items():
            slots = nn.functional.one_hot(routing.experts_TK, experts).sum(dim=1).view(len(labels), *grid, experts)
            of_samples = slots.sum(dim=(1, 2))  # [B, E]
            self.by_timestep[number].index_add_(0, binned, of_samples)
            self.by_class[number].index_add_(0, labels, of_samples)
            self.by_position[number] += slots.sum(dim=0)
            self.entropy[number] += routing.entropy * len(routing.experts_TK)
            self.tokens[number] += len(routing.experts_TK)

    def all_reduce(self) -> None:
        """Sum the counts of all ranks. Collective."""
        if self.by_position is not None and dist.is_initialized() and dist.get_world_size() > 1:
            for counts in (self.by_timestep, self.by_class, self.by_position, self.entropy, self.tokens):
                dist.all_reduce(counts)

    def report(self) -> RoutingReport:
        """Report the counts; UserError if there are none."""
        if self.by_position is None:
            raise UserError("there is no batch to trace the routing of; give at least one sample.")
        by_timestep, by_class, by_position = (c.cpu().numpy() for c in (self.by_timestep, self.by_class, self.by_position))
        totals = by_timestep.sum(axis=1)
        scale = np.log(self.config.num_experts) or 1.0
        fractions = totals / totals.sum(axis=1, keepdims=True)
        classes = np.flatnonzero(by_class.sum(axis=(0, 2)))
        return RoutingReport(
            tokens_per_expert=totals,
            load_entropy=-(fractions * np.log(np.where(fractions > 0, fractions, 1.0))).sum(axis=1) / scale,
            token_entropy=(self.entropy / self.tokens).cpu().numpy() / scale,
            share_by_timestep=_shares(by_timestep),
            timestep_edges=np.linspace(0, self.num_train_timesteps, by_timestep.shape[1] + 1),
            share_by_class=_shares(by_class[:, classes]),
            classes=classes,
            share_by_position=_shares(by_position),
        )


def _keep_first(seen: dict[int, Routing], number: int, routing: Routing) -> None:
    seen.setdefault(number, Routing(*(tensor.detach() for tensor in routing)))


def _shares(counts: NDArray[np.int64]) -> FloatArray:
    totals = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # takes a second to load, and training counts long before it draws

    return Figure(figsize=(width, height), layout="constrained")


def _heat_map(values: FloatArray, x_label: str, y_label: str, label: str) -> "Figure":
    figure = _figure(1.5 + 0.4 * values.shape[1], 1.5 + 0.25 * values.shape[0])
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, aspect="auto", interpolation="nearest")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.locator_params(integer=True)
    figure.colorbar(image, label=label)
    return figure


def _per_layer(values: FloatArray, y_label: str, rows: list[str]) -> "Figure":
    """Draw [L, rows, E] as one heat map per layer, all on one scale."""
    columns = min(4, len(values))
    lines = -(-len(values) // columns)
    figure = _figure(3 * columns, 2.4 * lines)
    all_axes: Any = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    ticks = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 10)).astype(int))
    for layer, axes in enumerate(all_axes.flat):
        axes.set_visible(layer < len(values))
        if layer < len(values):
            image = axes.imshow(values[layer], vmin=0, vmax=np.nanmax(values), aspect="auto", interpolation="nearest")
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.set_yticks(ticks, [rows[t] for t in ticks])
    figure.colorbar(image, ax=all_axes, label="share of a row's slots")
    figure.supxlabel("expert")
    figure.supylabel(y_label)
    return figure


def _grid(values: FloatArray) -> "Figure":
    """Draw [L, E, h, w] as a map per expert and layer, all on one scale. One image: 24 x 48 axes would take minutes."""
    layers, experts, height, width = values.shape
    tiled = np.full((layers, experts, height + 1, width + 1), np.nan)  # a gap to the right of and below each map
    tiled[..., :height, :width] = values
    figure = _figure(0.8 * experts + 1.5, 0.8 * layers + 0.8)
    axes = figure.subplots()
    whole = tiled.transpose(0, 2, 1, 3).reshape(layers * (height + 1), experts * (width + 1))[:-1, :-1]
    image = axes.imshow(whole, vmin=0, vmax=np.nanmax(values), aspect="auto", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_xticks([(width + 1) * e + (width - 1) / 2 for e in range(experts)], [str(e) for e in range(experts)])
    axes.set_yticks([(height + 1) * n + (height - 1) / 2 for n in range(layers)], [str(n) for n in range(layers)])
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="share of a position's slots")
    return figure
