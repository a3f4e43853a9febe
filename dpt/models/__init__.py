"""The networks: every size of the paper, their weights, and their costs.

Names are imported on first use, so that `dpt.models.costs` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpt.models.adapting import adapt as adapt
    from dpt.models.dit import DiT as DiT
    from dpt.models.dit import DiTOutput as DiTOutput
    from dpt.models.dit import build_model as build_model
    from dpt.models.exporting import export_weights as export_weights
    from dpt.models.pretrained import import_weights as import_weights
    from dpt.models.pretrained import read_weights as read_weights
    from dpt.models.upcycling import upcycle as upcycle
    from dpt.models.weights import Weights as Weights

_HOMES = {
    "DiT": "dit",
    "DiTOutput": "dit",
    "Weights": "weights",
    "adapt": "adapting",
    "build_model": "dit",
    "export_weights": "exporting",
    "import_weights": "pretrained",
    "read_weights": "pretrained",
    "upcycle": "upcycling",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
