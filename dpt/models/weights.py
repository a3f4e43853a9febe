"""A network's weights and architecture: returned by imports, taken by upcycling and adapting, kept by exports."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models.dit import DiT

_LISTED = 5
"""Names that an error lists before it only counts the rest."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors under the names of `DiT(config)`'s state dict, experts stacked by global id."""

    config: ModelConfig
    state: dict[str, Tensor]
    source: str = "our own"
    """The format they were read from."""
    averaged: bool = False
    """Whether these are averaged (EMA) weights."""
    sections: dict[str, Any] = field(default_factory=dict)
    """Other sections of an export's config.json: diffusion, vae, task, lineage."""

    def build(self) -> DiT:
        """Build the network with these weights, on one device; it shares the tensors."""
        check_state(self.config, self.state, self.source)
        with torch.device("meta"):
            model = DiT(self.config)
        model.load_state_dict(self.state, assign=True)
        return model


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of `DiT(config)`'s state dict."""
    return {name: tensor.shape for name, tensor in _template(config).items()}


@functools.lru_cache(maxsize=16)
def _template(config: ModelConfig) -> dict[str, Tensor]:
    """`DiT(config)`'s state dict on the meta device."""
    with torch.device("meta"):
        return DiT(config).state_dict()


def check_state(config: ModelConfig, state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError listing what is missing, unknown, or shaped otherwise than in `DiT(config)`."""
    shapes = expected_shapes(config)
    wrong = (
        f"{name} is {list(state[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in state and state[name].shape != shape
    )
    refuse(source, missing=shapes.keys() - state.keys(), unknown=state.keys() - shapes.keys(), wrong=wrong)


def check_numbers(config: ModelConfig, state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError if a tensor's kind of number differs from `DiT(config)`'s, or it holds NaN or infinite values."""
    kinds = {name: tensor.is_floating_point() for name, tensor in _template(config).items()}
    wrong = sorted(
        f"{n} of {str(t.dtype).removeprefix('torch.')}" for n, t in state.items() if t.is_floating_point() != kinds[n]
    )
    if wrong:
        raise UserError(f"{source}: weights of another type of number than the network's: {_enumerate(wrong)}.")
    bad = sorted(n for n, t in state.items() if kinds[n] and t.numel() and not _is_finite(t))
    if bad:
        raise UserError(f"{source}: NaN or infinite values in {_enumerate(bad)}; get or train these weights again.")


def _is_finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor.float())  # NaN passes through both
    return bool(torch.isfinite(low) & torch.isfinite(high))


def refuse(source: str, *, missing: Iterable[str] = (), unknown: Iterable[str] = (), wrong: Iterable[str] = ()) -> None:
    """Raise UserError listing everything that does not fit, if anything."""
    lists = {"missing": sorted(missing), "unknown": sorted(unknown), "wrong shape": sorted(wrong)}
    parts = [f"{title}: {_enumerate(names)}" for title, names in lists.items() if names]
    if parts:
        raise UserError(f"{source}: these are not complete weights of the network they resemble ({'; '.join(parts)}).")


def _enumerate(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
