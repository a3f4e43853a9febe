"""The networks: every size of the paper, their weights, and their costs.

Names are imported on first use, so that `dpt.models.costs` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpt.models.dit import DiT as DiT
    from dpt.models.dit import DiTOutput as DiTOutput
    from dpt.models.dit import build_model as build_model

_HOMES = {
    "DiT": "dit",
    "DiTOutput": "dit",
    "build_model": "dit",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
