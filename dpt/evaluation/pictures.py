"""Predictions as pictures: colour maps of depth, flow and masks, and pages that compare them with the truth."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from dpt import tasks
from dpt.evaluation.protocols import Protocol, align_depth_to_truth, counted_pixels

LONGEST = 384
"""Longest side of a picture in a page, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample in a page: panels uint8 `[H, W, 3]` by title, and a caption."""

    caption: str
    panels: dict[str, np.ndarray]


def colour_depth(depth: np.ndarray, low: float, high: float, valid: np.ndarray | None = None) -> np.ndarray:
    """Depth `[H, W]` -> uint8 `[H, W, 3]`: near red, far blue between `low` and `high`; black where invalid."""
    unit = np.clip((depth - low) / max(high - low, 1e-9), 0.0, 1.0)
    return _coloured(unit, "Spectral", valid)


def colour_error(error: np.ndarray, high: float, valid: np.ndarray | None = None) -> np.ndarray:
    """Errors `[H, W]` from 0 (black) to `high` (bright) -> uint8 `[H, W, 3]`; grey where invalid."""
    return _coloured(np.clip(error / max(high, 1e-9), 0.0, 1.0), "inferno", valid, fill=128)


def _coloured(unit: np.ndarray, name: str, valid: np.ndarray | None, fill: int = 0) -> np.ndarray:
    image = (colormaps[name](unit)[..., :3] * 255).round().astype(np.uint8)
    if valid is not None:
        image[~valid] = fill
    return image


def colour_flow(flow: np.ndarray, longest_motion: float) -> np.ndarray:
    """Flow `[2, H, W]` -> uint8 `[H, W, 3]` on Baker et al.'s (2011) colour wheel: hue is direction, saturation is length."""
    u, v = flow / max(longest_motion, 1e-9)
    length = np.hypot(u, v)
    wheel = _colour_wheel()
    position = (np.arctan2(-v, -u) / np.pi + 1.0) / 2.0 * (len(wheel) - 1)
    below = np.floor(position).astype(int)
    share = (position - below)[..., None]
    hue = (1 - share) * wheel[below] + share * wheel[(below + 1) % len(wheel)]
    inside = 1.0 - np.minimum(length, 1.0)[..., None] * (1.0 - hue)
    return (np.where(length[..., None] <= 1.0, inside, 0.75 * hue) * 255).round().astype(np.uint8)


def _colour_wheel() -> np.ndarray:
    """The wheel's 55 colours, float `[55, 3]` in [0, 1]: six ramps from red over yellow, green, cyan, blue and magenta."""
    ramps = ((15, 0, 1, 1), (6, 1, 0, -1), (4, 1, 2, 1), (11, 2, 1, -1), (13, 2, 0, 1), (6, 0, 2, -1))
    colours = []
    for count, full, moving, direction in ramps:
        ramp = np.zeros((count, 3))
        ramp[:, full] = 1.0
        ramp[:, moving] = np.arange(count) / count if direction > 0 else 1.0 - np.arange(count) / count
        colours.append(ramp)
    return np.concatenate(colours)


def overlay_mask(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = (40, 220, 120)) -> np.ndarray:
    """The image uint8 `[H, W, 3]` with the mask bool `[H, W]` tinted."""
    tinted = 0.45 * image + 0.55 * np.array(colour)
    return np.where(mask[..., None], tinted, image).astype(np.uint8)


def compare(
    protocol: Protocol, caption: str, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, uncertainty: np.ndarray
) -> Row:
    """Input, truth, prediction, error and uncertainty of one sample, all at the truth's size, as panels."""
    height, width = truth.shape[-2:]
    size = tasks.fit_size(height, width, min(LONGEST, max(height, width)), multiple=1)
    shown = tasks.resize_image(image, (height, width))
    valid = counted_pixels(protocol, truth)
    if protocol.task == "depth":
        metres = align_depth_to_truth(protocol, prediction, truth, valid)
        low, high = np.quantile(truth[valid], (0.02, 0.98))
        error = np.abs(metres - truth) / np.where(valid, truth, 1.0)
        maps = [colour_depth(truth, low, high, valid), colour_depth(metres, low, high), colour_error(error, 0.3, valid)]
    elif protocol.task == "flow":
        longest = float(np.quantile(np.hypot(*truth)[valid], 0.99))
        error = np.hypot(*(prediction - truth))
        maps = [
            colour_flow(truth, longest),
            colour_flow(prediction, longest),
            colour_error(error, max(3.0, longest / 4), valid),
        ]
    elif (encode := tasks.task_spec(protocol.task).encode) is not None:  # its code is a picture
        error = np.linalg.norm(prediction - truth, axis=0)
        shown_maps = [tasks.image_to_uint8(encode(np.where(valid, truth, 0.0))[0]), tasks.image_to_uint8(encode(prediction)[0])]
        maps = [*shown_maps, colour_error(error, float(np.quantile(error[valid], 0.99)), valid)]
    else:
        wrong = np.zeros((*truth.shape, 3), np.uint8)
        wrong[prediction & truth], wrong[prediction & ~truth], wrong[~prediction & truth] = 255, (255, 64, 64), (64, 96, 255)
        maps = [overlay_mask(shown, truth), overlay_mask(shown, prediction), wrong]
    titles = ("truth", "prediction", "error")
    panels = {"input": shown, **dict(zip(titles, maps, strict=True))}
    if uncertainty.any():
        panels["uncertainty"] = colour_error(uncertainty, float(np.quantile(uncertainty, 0.99)))
    return Row(caption=caption, panels={title: tasks.resize_image(panel, size) for title, panel in panels.items()})


def write_page(rows: Sequence[Row], path: Path, title: str) -> None:
    """Rows of panels under one title, as one PNG."""
    columns = max(len(row.panels) for row in rows)
    height, width = next(iter(rows[0].panels.values())).shape[:2]
    figure = Figure(figsize=(2.4 * columns, (2.4 * height / width + 0.35) * len(rows) + 0.4), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (name, panel) in zip(line, row.panels.items(), strict=False):
            axis.imshow(panel)
            axis.set_title(name if axis is not line[0] else row.caption, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
