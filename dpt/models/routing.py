"""What the routers do: which experts get which tokens, by layer, timestep, class and patch position; as arrays and pictures."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from dpt.errors import UserError
from dpt.models.dit import DiT
from dpt.models.moe import Routing

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
        """Write `routing.npz` with all arrays and one heat map a question; returns the files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "routing.npz", **vars(self))
        layers, _, _, experts = self.share_by_position.shape
        edges = [f"{e:.0f}" for e in self.timestep_edges]
        figures = {
            "tokens_per_expert": _heat_map(_shares(self.tokens_per_expert), "expert", "layer", "share of a layer's slots"),
            "share_by_timestep": _per_layer(self.share_by_timestep, "timesteps from", edges[:-1]),
            "share_by_class": _per_layer(self.share_by_class, "class", [str(c) for c in self.classes]),
            "share_by_position": _grid(self.share_by_position.transpose(0, 3, 1, 2), layers, experts),
        }
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=100)
        return [folder / "routing.npz", *(folder / f"{name}.png" for name in figures)]


@torch.no_grad()
def trace_routing(
    model: DiT, batches: Iterable[Mapping[str, Tensor]], *, num_train_timesteps: int = 1000, timestep_bins: int = 10
) -> RoutingReport:
    """Run `model` on batches and report its routing.

    A batch holds the network's arguments by name (noisy_latents, timesteps, labels, ...); latents must be of one size.
    Timesteps are sorted into equal bins of [0, num_train_timesteps). UserError if the model has no experts or there is no
    batch.
    """
    gates = [block.moe.gate for block in model.blocks if block.moe is not None]
    if not gates:
        raise UserError("the model has no experts, so there is no routing to show; give weights of a Mixture-of-Experts.")
    tally = _Tally(len(gates), model.config.num_experts, num_train_timesteps, timestep_bins)
    routings: list[Routing] = []
    hooks = [gate.register_forward_hook(lambda _module, _args, routing: routings.append(routing)) for gate in gates]
    try:
        for batch in batches:
            routings.clear()
            model(**batch)
            grid = tuple(side // model.config.patch_size for side in batch["noisy_latents"].shape[2:])
            tally.add(routings, batch["timesteps"], batch["labels"], grid)
    finally:
        for hook in hooks:
            hook.remove()
    return tally.report()


class _Tally:
    """Counts of slots by layer, and by what else is asked."""

    def __init__(self, layers: int, experts: int, num_train_timesteps: int, bins: int) -> None:
        self.layers, self.experts, self.bins, self.num_train_timesteps = layers, experts, bins, num_train_timesteps
        self.by_timestep = np.zeros((layers, bins, experts), dtype=np.int64)
        self.by_class: dict[int, NDArray[np.int64]] = defaultdict(lambda: np.zeros((layers, experts), dtype=np.int64))
        self.by_position: NDArray[np.int64] | None = None
        self.entropy, self.tokens = np.zeros(layers), 0

    def add(self, routings: list[Routing], timesteps: Tensor, labels: Tensor, grid: tuple[int, ...]) -> None:
        samples = len(labels)
        chosen = torch.stack([r.experts_TK for r in routings])  # [L, B h w, K]
        slots = nn.functional.one_hot(chosen, self.experts).sum(dim=2)
        counts = slots.view(self.layers, samples, -1, self.experts).cpu().numpy()  # [L, B, h w, E]
        bins = (timesteps.cpu().double() * self.bins / self.num_train_timesteps).long().clamp(0, self.bins - 1)
        for sample, (bin_, label) in enumerate(zip(bins.tolist(), labels.tolist(), strict=True)):
            mine = counts[:, sample].sum(axis=1)
            self.by_timestep[:, bin_] += mine
            self.by_class[label] += mine
        by_position = counts.sum(axis=1).reshape(self.layers, *grid, self.experts)
        if self.by_position is not None and self.by_position.shape != by_position.shape:
            raise UserError("the batches hold latents of several sizes; shares by position need one.")
        self.by_position = by_position if self.by_position is None else self.by_position + by_position
        probs = torch.stack([r.probs_TE for r in routings])
        self.entropy += torch.special.entr(probs).sum(dim=(1, 2)).cpu().double().numpy()
        self.tokens += chosen.shape[1]

    def report(self) -> RoutingReport:
        if self.by_position is None:
            raise UserError("there is no batch to trace the routing of; give at least one sample.")
        totals = self.by_timestep.sum(axis=1)
        scale = np.log(self.experts) or 1.0
        fractions = totals / totals.sum(axis=1, keepdims=True)
        classes = sorted(self.by_class)
        return RoutingReport(
            tokens_per_expert=totals,
            load_entropy=-(fractions * np.log(np.where(fractions > 0, fractions, 1.0))).sum(axis=1) / scale,
            token_entropy=self.entropy / self.tokens / scale,
            share_by_timestep=_shares(self.by_timestep),
            timestep_edges=np.linspace(0, self.num_train_timesteps, self.bins + 1),
            share_by_class=_shares(np.stack([self.by_class[c] for c in classes], axis=1)),
            classes=np.array(classes),
            share_by_position=_shares(self.by_position),
        )


def _shares(counts: NDArray[np.int64]) -> FloatArray:
    totals = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)


def _heat_map(values: FloatArray, x_label: str, y_label: str, title: str) -> Figure:
    figure = Figure(figsize=(1.5 + 0.4 * values.shape[1], 1.5 + 0.25 * values.shape[0]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, aspect="auto", interpolation="nearest")
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    figure.colorbar(image)
    return figure


def _per_layer(values: FloatArray, y_label: str, rows: list[str]) -> Figure:
    """[L, rows, E]: a heat map a layer, all on one scale."""
    columns = min(4, len(values))
    lines = -(-len(values) // columns)
    figure = Figure(figsize=(3 * columns, 2.4 * lines), layout="constrained")
    all_axes: Any = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    ticks = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 10)).astype(int))
    for layer, axes in enumerate(all_axes.flat):
        axes.set_visible(layer < len(values))
        if layer < len(values):
            image = axes.imshow(values[layer], vmin=0, vmax=np.nanmax(values), aspect="auto", interpolation="nearest")
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.set_yticks(ticks, [rows[t] for t in ticks])
    figure.colorbar(image, ax=all_axes, label="share")
    figure.supxlabel("expert")
    figure.supylabel(y_label)
    return figure


def _grid(values: FloatArray, layers: int, experts: int) -> Figure:
    """[L, E, h, w]: a map an expert and layer, all on one scale."""
    figure = Figure(figsize=(0.8 * experts + 1.5, 0.8 * layers + 0.8), layout="constrained")
    all_axes: Any = figure.subplots(layers, experts, squeeze=False)
    for (layer, expert), axes in np.ndenumerate(all_axes):
        image = axes.imshow(values[layer, expert], vmin=0, vmax=np.nanmax(values), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        if layer == 0:
            axes.set_title(f"expert {expert}", fontsize=7)
        if expert == 0:
            axes.set_ylabel(f"layer {layer}", fontsize=7)
    figure.colorbar(image, ax=all_axes, label="share")
    return figure
