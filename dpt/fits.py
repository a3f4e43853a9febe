"""How pictures are resized for a network: the same in encoding, training and prediction.

Shards record it (`fit` in the manifest's `encoding`), weights trained on them carry it (`fits` in `config.json`, by task), and
prediction follows the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dpt.errors import UserError
from dpt.tasks import TASKS, fit_size

How = Literal["stretch", "crop", "pad", "aspect"]
FITS: tuple[str, ...] = get_args(How)
"""stretch: both sides to the square; crop: the central square; pad: to the right and below; aspect: the sides in their
proportion, rounded to whole tokens."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How pictures are resized. The defaults, for weights that record nothing, keep the aspect and use the network's size."""

    how: str = "aspect"
    """How to resize: one of `FITS`."""
    resolution: int = 0
    """Side of the square in pixels, or the longer side with "aspect"; 0: the network's intended size."""

    @property
    def whole(self) -> str:
        """The fit for prediction, where pictures must be whole and without margins: "stretch" or "aspect"."""
        return "stretch" if self.how == "stretch" else "aspect"

    def size(self, height: int, width: int, resolution: int, *, multiple: int) -> tuple[int, int]:
        """(h, w) to predict a picture at, in multiples of `multiple`; `resolution` as above."""
        if self.whole == "stretch":
            return fit_size(1, 1, resolution, multiple=multiple)
        return fit_size(height, width, resolution, multiple=multiple)

    def __str__(self) -> str:
        return f"{self.how} at {self.resolution} px" if self.resolution else self.how


def read_fit(value: Any, source: str) -> Fit:
    """Read a fit from config.json, `{"fit", "resolution"}`; UserError, naming `source`, if it is invalid."""
    try:
        fit = Fit(how=value["fit"], resolution=int(value.get("resolution", 0)))
    except (TypeError, KeyError, ValueError, AttributeError):
        fit = Fit(how="")
    if fit.how not in FITS or fit.resolution < 0:
        raise UserError(f"{source}: fit {value!r} is unknown; it has one of {', '.join(FITS)}, and a resolution.")
    return fit


def fits_of(said: Mapping[str, Any], source: str) -> dict[str, Fit]:
    """The fit of each perception task that the weights' sections name ("fits"); the default for the others."""
    found = said.get("fits") or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{source}: fits is {found!r}; it must be an object of tasks.")
    return {task: read_fit(found[task], source) if task in found else Fit() for task in TASKS if task != "class"}


def as_section(fits: Mapping[str, Fit]) -> dict[str, Any]:
    """Write fits in the form that `fits_of` reads."""
    return {task: {"fit": fit.how, "resolution": fit.resolution} for task, fit in fits.items()}
