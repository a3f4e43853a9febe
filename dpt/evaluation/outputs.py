"""A prediction as the files that a user of `dpt predict` gets."""

from pathlib import Path

import numpy as np
from PIL import Image

from dpt.evaluation.given import write_flo
from dpt.evaluation.pictures import colour_depth, colour_error, colour_flow, overlay_mask
from dpt.evaluation.prediction import Prediction


def write_outputs(prediction: Prediction, task: str, image: np.ndarray, folder: Path, name: str) -> list[Path]:
    """Write FOLDER/NAME_*; the files in order.

    depth: _depth.npy float32 (up to scale and shift), _depth.png 16 bits (least to greatest depth on 0 to 65535) and
    _depth_colour.png. flow: _flow.flo in pixels, _flow.png on the colour wheel (full colour at the longest motion). amodal:
    _mask.png, _overlay.png. With an ensemble also _uncertainty.npy and .png. image: the input uint8 `[H, W, 3]`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def place(suffix: str) -> Path:
        written.append(folder / f"{name}_{suffix}")
        return written[-1]

    value = prediction.value
    if task == "depth":
        low, high = float(value.min()), float(value.max())
        unit = (value - low) / max(high - low, 1e-9)
        np.save(place("depth.npy"), value)
        Image.fromarray((unit * 65535).round().astype(np.uint16)).save(place("depth.png"))
        Image.fromarray(colour_depth(value, *np.quantile(value, (0.02, 0.98)))).save(place("depth_colour.png"))
    elif task == "flow":
        write_flo(place("flow.flo"), value)
        Image.fromarray(colour_flow(value, float(np.hypot(*value).max()))).save(place("flow.png"))
    else:
        Image.fromarray(value.astype(np.uint8) * 255).save(place("mask.png"))
        Image.fromarray(overlay_mask(image, value)).save(place("overlay.png"))
    if prediction.uncertainty.any():
        np.save(place("uncertainty.npy"), prediction.uncertainty)
        high = float(np.quantile(prediction.uncertainty, 0.99))
        Image.fromarray(colour_error(prediction.uncertainty, high)).save(place("uncertainty.png"))
    return written
