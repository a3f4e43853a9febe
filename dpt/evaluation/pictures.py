"""Render predictions as pictures: colour maps of depth, flow and masks; pages and scenes that compare them with the truth."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import binary_erosion

from dpt import tasks
from dpt.evaluation.protocols import Protocol, align_depth_to_truth, counted_pixels
from dpt.evaluation.records import Record
from dpt.scores import readable, round_ticks

LONGEST = 640
"""Longest side of a panel, in pixels."""
DEPTH_COLOURS, ERROR_COLOURS = "Spectral", "inferno"
SCENES_VERSION = 1
_RIGHT, _TOO_MUCH, _MISSING = (255, 255, 255), (255, 64, 64), (64, 96, 255)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Colour scale of a panel: values from `low` to `high` in `unit`; for the colours "wheel", motions up to `high`."""

    colours: str
    low: float
    high: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture uint8 `[H, W, 3]`, its title, and the scale of its colours."""

    picture: np.ndarray
    title: str
    scale: Scale | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample on a page: its panels keyed by role (input, second or visible, truth, prediction, error, uncertainty)."""

    caption: str
    panels: dict[str, Panel]


def colour_depth(depth: np.ndarray, low: float, high: float, valid: np.ndarray | None = None) -> np.ndarray:
    """Depth `[H, W]` -> uint8 `[H, W, 3]`: red (near, `low`) to blue (far, `high`); black where invalid."""
    unit = np.clip((depth - low) / max(high - low, 1e-9), 0.0, 1.0)
    return _coloured(unit, DEPTH_COLOURS, valid)


def colour_error(error: np.ndarray, high: float, valid: np.ndarray | None = None) -> np.ndarray:
    """Errors `[H, W]` from 0 (black) to `high` (bright) -> uint8 `[H, W, 3]`; grey where invalid."""
    return _coloured(np.clip(error / max(high, 1e-9), 0.0, 1.0), ERROR_COLOURS, valid, fill=128)


def _coloured(unit: np.ndarray, name: str, valid: np.ndarray | None, fill: int = 0) -> np.ndarray:
    """As matplotlib colours `unit`, in [0, 1], black where it is NaN, without its four float64 arrays of the picture's size."""
    table = _colour_table(name)
    place = np.minimum(np.nan_to_num(unit) * (len(table) - 1), len(table) - 2).astype(np.uint16)
    place[np.isnan(unit)] = len(table) - 1
    image = table.take(place, axis=0)
    if valid is not None:
        image[~valid] = fill
    return image


@lru_cache(maxsize=8)
def _colour_table(name: str) -> np.ndarray:
    """A matplotlib map's colours uint8 `[N, 3]`, and black."""
    colours = colormaps[name](np.arange(colormaps[name].N))[:, :3]
    return np.concatenate(((colours * 255).round().astype(np.uint8), np.zeros((1, 3), np.uint8)))


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


def flow_wheel(side: int = 96) -> np.ndarray:
    """The legend of `colour_flow`, uint8 `[side, side, 3]`: each motion's colour where its arrow from the centre would end."""
    v, u = np.mgrid[-1.0 : 1.0 : side * 1j, -1.0 : 1.0 : side * 1j]
    wheel = colour_flow(np.stack([u, v]), 1.0)
    wheel[np.hypot(u, v) > 1.0] = 255
    return wheel


def overlay_mask(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = (40, 220, 120)) -> np.ndarray:
    """The image uint8 `[H, W, 3]` with the mask bool `[H, W]` tinted and outlined in white."""
    tinted = 0.45 * image + 0.55 * np.array(colour)
    shown = np.where(mask[..., None], tinted, image).astype(np.uint8)
    shown[mask & ~binary_erosion(mask)] = 255
    return shown


def compare(
    protocol: Protocol,
    caption: str,
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    uncertainty: np.ndarray,
    *,
    second: np.ndarray | None = None,
    visible: np.ndarray | None = None,
) -> Row:
    """Panels of one sample: input, truth, prediction, error and uncertainty, all at the truth's size (at most `LONGEST`).

    second: flow's second frame, uint8 `[H, W, 3]`. visible: amodal's visible mask, bool `[H, W]`. Arrays as in
    `dpt.evaluation.sets.Sample` and `Prediction`.
    """
    height, width = truth.shape[-2:]
    size = tasks.fit_size(height, width, min(LONGEST, max(height, width)), multiple=1)
    shown = tasks.resize_image(image, (height, width))
    panels = {"input": Panel(picture=shown, title="first frame" if protocol.task == "flow" else "image")}
    if second is not None:
        panels["second"] = Panel(picture=tasks.resize_image(second, (height, width)), title="second frame")
    if visible is not None:
        panels["visible"] = Panel(picture=overlay_mask(shown, visible), title="visible mask (given)")
    if protocol.task == "amodal":
        panels |= _mask_panels(shown, truth, prediction)
    else:
        compared = {"depth": _depth_panels, "flow": _flow_panels}.get(protocol.task, _registered_panels)
        panels |= compared(protocol, truth, prediction)
    if uncertainty.any():
        high = float(np.quantile(uncertainty, 0.99))
        unit, factor = {"depth": ("% of the depth range", 100), "flow": ("px", 1)}.get(protocol.task, ("% of the votes", 100))
        panels["uncertainty"] = _error_panel(uncertainty, high, "spread of the members", unit, factor=factor)
    resized = {
        name: Panel(picture=tasks.resize_image(panel.picture, size), title=panel.title, scale=panel.scale)
        for name, panel in panels.items()
    }
    return Row(caption=caption, panels=resized)


def _error_panel(
    error: np.ndarray, high: float, title: str, unit: str, valid: np.ndarray | None = None, *, factor: float = 1
) -> Panel:
    """Panel of `colour_error` with its scale in `unit`, `factor` of which equal 1."""
    scale = Scale(colours=ERROR_COLOURS, low=0.0, high=high * factor, unit=unit)
    return Panel(picture=colour_error(error, high, valid), title=title, scale=scale)


def _depth_panels(protocol: Protocol, truth: np.ndarray, prediction: np.ndarray) -> dict[str, Panel]:
    valid = counted_pixels(protocol, truth)
    metres = align_depth_to_truth(protocol, prediction, truth, valid)
    low, high = (float(q) for q in np.quantile(truth[valid], (0.02, 0.98)))
    depth = Scale(colours=DEPTH_COLOURS, low=low, high=high, unit="m")
    error = np.abs(metres - truth) / np.where(valid, truth, 1.0)
    return {
        "truth": Panel(picture=colour_depth(truth, low, high, valid), title="true depth", scale=depth),
        "prediction": Panel(picture=colour_depth(metres, low, high), title="predicted depth", scale=depth),
        "error": _error_panel(error, 0.3, "relative error", "%", valid, factor=100),
    }


def _flow_panels(protocol: Protocol, truth: np.ndarray, prediction: np.ndarray) -> dict[str, Panel]:
    valid = counted_pixels(protocol, truth)
    longest = float(np.quantile(np.hypot(*truth)[valid], 0.99))
    wheel = Scale(colours="wheel", low=0.0, high=longest, unit="px")
    error, high = np.hypot(*(prediction - truth)), max(3.0, longest / 4)
    return {
        "truth": Panel(picture=colour_flow(truth, longest), title="true motion", scale=wheel),
        "prediction": Panel(picture=colour_flow(prediction, longest), title="predicted motion", scale=wheel),
        "error": _error_panel(error, high, "end-point error", "px", valid),
    }


def _registered_panels(protocol: Protocol, truth: np.ndarray, prediction: np.ndarray) -> dict[str, Panel]:
    """Panels of a registered task: the pictures that code its values."""
    encode, valid = tasks.task_spec(protocol.task).encode, counted_pixels(protocol, truth)
    assert encode is not None, "registered tasks say how their values become pictures"
    error = np.linalg.norm(prediction - truth, axis=0)
    high = float(np.quantile(error[valid], 0.99))
    return {
        "truth": Panel(picture=tasks.image_to_uint8(encode(np.where(valid, truth, 0.0))[0]), title=f"true {protocol.task}"),
        "prediction": Panel(picture=tasks.image_to_uint8(encode(prediction)[0]), title=f"predicted {protocol.task}"),
        "error": _error_panel(error, high, "length of the difference", "", valid),
    }


def _mask_panels(shown: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> dict[str, Panel]:
    wrong = np.zeros((*truth.shape, 3), np.uint8)
    wrong[prediction & truth], wrong[prediction & ~truth], wrong[~prediction & truth] = _RIGHT, _TOO_MUCH, _MISSING
    return {
        "truth": Panel(picture=overlay_mask(shown, truth), title="true whole object"),
        "prediction": Panel(picture=overlay_mask(shown, prediction), title="predicted whole object"),
        "error": Panel(picture=wrong, title="white: right, red: too much, blue: missing"),
    }


def write_page(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write rows of panels under one title as a PNG: each row below its caption, each panel above its colour scale."""
    columns = max(len(row.panels) for row in rows)
    shape = next(iter(rows[0].panels.values())).picture.shape
    side = 2.6  # inches
    with_scales = any(panel.scale for row in rows for panel in row.panels.values())
    strip = 0.62 if with_scales else 0.1
    tall = side * shape[0] / shape[1]
    figure = Figure(figsize=(side * columns + 0.3, (tall + strip + 0.5) * len(rows) + 0.45), dpi=110)
    figure.text(0.15 / figure.get_figwidth(), 1 - 0.25 / figure.get_figheight(), title, fontsize=11, weight="bold", va="center")
    width, height = figure.get_figwidth(), figure.get_figheight()
    for line, row in enumerate(rows):
        top = height - 0.45 - (tall + strip + 0.5) * line
        figure.text(0.15 / width, (top - 0.16) / height, row.caption, fontsize=9, va="center")
        for column, panel in enumerate(row.panels.values()):
            left = 0.15 + side * column
            box = (left / width, (top - 0.44 - tall) / height, (side - 0.12) / width, tall * (side - 0.12) / side / height)
            axis = figure.add_axes(box)
            axis.imshow(panel.picture)
            axis.set_axis_off()
            axis.set_title(panel.title, fontsize=8, loc="left", pad=3)
            if panel.scale is not None:
                _draw_scale(figure, panel.scale, left / width, (top - 0.44 - tall) / height, width, height, side)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_scale(figure: Figure, scale: Scale, left: float, top: float, width: float, height: float, side: float) -> None:
    """Draw a panel's colour bar with its unit, or the motion wheel, below `top` (shares of the figure)."""
    if scale.colours == "wheel":
        axis: Any = figure.add_axes((left, top - 0.5 / height, 0.45 / width, 0.45 / height))
        axis.imshow(flow_wheel())
        axis.set_axis_off()
        place = (left + 0.55 / width, top - 0.28 / height)
        figure.text(*place, f"motion; rim: {readable(scale.high)} {scale.unit}", fontsize=8, va="center")
        return
    axis = figure.add_axes((left, top - 0.14 / height, (side - 0.12) / width, 0.09 / height))
    axis.imshow(
        colormaps[scale.colours](np.linspace(0, 1, 256))[None, :, :3], aspect="auto", extent=(scale.low, scale.high, 0, 1)
    )
    axis.set_yticks([])
    axis.set_xticks(ticks := round_ticks(scale.low, scale.high), [readable(t) for t in ticks])
    axis.tick_params(labelsize=7, length=2, pad=2)
    span = max(scale.high - scale.low, 1e-9)
    for label, tick in zip(axis.get_xticklabels(), ticks, strict=True):  # end labels must not touch the neighbouring panels'
        share = (tick - scale.low) / span
        label.set_horizontalalignment("left" if share < 0.03 else "right" if share > 0.97 else "center")
    axis.set_xlabel(scale.unit, fontsize=7, labelpad=1)


def write_scenes(scenes: Sequence[tuple[Record, Row]], folder: Path, *, metric: str, about: dict[str, Any]) -> None:
    """Write each panel of each scene, of one setting, to `folder` as its own PNG; scenes.json, which names them; and for
    motions wheel.png, their legend. Older files are replaced.

    `about` (the set's name, task, number of samples, whether it is synthetic) is stored in scenes.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    listed = []
    if any(p.scale is not None and p.scale.colours == "wheel" for _, row in scenes for p in row.panels.values()):
        Image.fromarray(flow_wheel()).save(folder / "wheel.png", format="png")
    for number, (record, row) in enumerate(scenes):
        panels = {}
        for name, panel in row.panels.items():
            file = f"{number:02d}_{name}.png"
            Image.fromarray(panel.picture).save(folder / file, format="png")
            panels[name] = {
                "file": file,
                "title": panel.title,
                "scale": asdict(panel.scale) if panel.scale is not None else None,
            }
        listed.append({"key": record.key, "value": record.metrics[metric], "panels": panels})
    setting = scenes[0][0].setting
    steps = {"steps": setting.steps, "ensemble": setting.ensemble} if setting.kind == "model" else {}
    index = {"version": SCENES_VERSION, **about, "metric": metric, **steps, "scenes": listed}
    (folder / "scenes.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
