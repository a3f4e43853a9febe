"""Convert targets of tasks to images in [-1, 1] and back: the codes of depth, optical flow and whole objects.

Shared by the offline encoder and the evaluator, so that one reads what the other writes. Needs numpy only; the decoders
also take torch tensors (any device) and return tensors. Images are float32 `[3, H, W]` in [-1, 1] unless said otherwise.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dpt.errors import UserError
from dpt.tasks import image_to_float, visible_object

# --- depth --------------------------------------------------------------------------------------------------------------

DEPTH_CODE = "linear"
"""The default depth code, as in the paper."""
DEPTH_CODES = (DEPTH_CODE, "log", "disparity")
"""linear: depth itself; log, disparity: finer at close range (see `encode_depth`)."""
DEPTH_SPREAD = 4.0
"""Far over near of an image whose codes "log" and "disparity" are its depth's logarithm and inverse exactly: the median of the
synthetic scenes (half of them lie between 3.6 and 4.5)."""


def encode_depth(
    depth: np.ndarray,
    valid: np.ndarray | None = None,
    *,
    code: str = DEPTH_CODE,
    quantiles: tuple[float, float] = (0.02, 0.98),
) -> tuple[np.ndarray, tuple[float, float]]:
    """Depth `[H, W]` in metres (0: invalid) -> image `[3, H, W]`, and (near, far) in metres, which map to -1 and 1.

    Affine between the two quantiles over valid depth, clipped (Marigold, Ke et al. 2024, eq. 1), which makes u in [0, 1]; then
    `code`, one of `DEPTH_CODES`, with r = `DEPTH_SPREAD` and d = 1 + (r - 1) u: "linear" u, "log" log d / log r, "disparity"
    (1 - 1 / d) / (1 - 1 / r). Where far / near = r these are the logarithm and the inverse of depth between the quantiles.
    Elsewhere too they decode to u exactly, which is depth up to scale and shift, as protocols score it; the logarithm itself
    would need far / near for decoding, which no prediction knows. Near and invalid pixels are -1 in every code. UserError
    if no pixel is valid.
    """
    valid = depth > 0 if valid is None else valid & (depth > 0)
    if not valid.any():
        raise UserError("a depth map has no valid pixel (depth > 0); filter it out.")
    near, far = (float(q) for q in np.quantile(depth[valid], quantiles))
    unit = np.clip((np.where(valid, depth, near) - near) / max(far - near, 1e-6), 0.0, 1.0)
    if code == "log":
        unit = np.log1p((DEPTH_SPREAD - 1.0) * unit) / np.log(DEPTH_SPREAD)
    elif code == "disparity":
        unit = DEPTH_SPREAD * unit / (1.0 + (DEPTH_SPREAD - 1.0) * unit)
    image = unit.astype(np.float32) * 2.0 - 1.0
    return np.repeat(image[None], 3, axis=0), (near, far)


def decode_depth(image: Any, code: str = DEPTH_CODE) -> Any:
    """Image `[..., 3, H, W]` -> affine-invariant depth `[..., H, W]` in [0, 1], for any `code`. Arrays or tensors."""
    return uncode_depth((image.mean(-3).clip(-1.0, 1.0) + 1.0) / 2.0, code)


def uncode_depth(values: Any, code: str) -> Any:
    """Coded depth in [0, 1] -> depth in [0, 1], up to scale and shift. Numbers, arrays or tensors."""
    if code == "log":
        return (DEPTH_SPREAD**values - 1.0) / (DEPTH_SPREAD - 1.0)
    if code == "disparity":
        return values / (DEPTH_SPREAD - (DEPTH_SPREAD - 1.0) * values)
    return values


def depth_code_slope(unit_depth: Any, code: str) -> Any:
    """Slope of coded depth over depth, both in [0, 1], at depth `unit_depth`. Numbers, arrays or tensors."""
    growth = 1.0 + (DEPTH_SPREAD - 1.0) * unit_depth
    if code == "log":
        return (DEPTH_SPREAD - 1.0) / np.log(DEPTH_SPREAD) / growth
    if code == "disparity":
        return DEPTH_SPREAD / growth**2
    return unit_depth * 0.0 + 1.0


# --- optical flow -------------------------------------------------------------------------------------------------------

FLOW_KNEE = 1.0 / 16.0
"""Motion, as a fraction of the image's side, below which the flow code is roughly linear and above which it is logarithmic."""


FLOW_CODE = "log"
"""The default flow code."""
FLOW_CODES = (FLOW_CODE, "linear_75")
"""log: see `encode_flow`. linear_75: u / 75, v / 75 in pixels of FlyingChairs' 512 x 384 frames (released generalist)."""
_LINEAR_REACH = (75.0 / 512.0, 75.0 / 384.0)


def encode_flow(flow: np.ndarray, code: str = FLOW_CODE) -> np.ndarray:
    """Flow `[2, H, W]` in pixels -> images `[2, 3, H, W]`: x = sign(f) log(1 + |f| / k) / log(1 + 1 / k), f = (u / W, v / H).

    Motion up to the whole image maps into [-1, 1] (see `count_clipped_flow`), small motion still gets a good share of the
    range, and the code commutes with resizing. Through a small 8x VAE at 256 x 192 pixels, FlyingChairs' flow comes back with a
    smaller error than in the linear codes flow / 75 px (which clips: real motion reaches 121 px) or flow / size.
    `code`: one of `FLOW_CODES`.
    """
    normalised = flow / np.array([flow.shape[-1], flow.shape[-2]], dtype=np.float32)[:, None, None]
    if code == "linear_75":
        values = normalised / np.array(_LINEAR_REACH, dtype=np.float32)[:, None, None]
    else:
        values = np.sign(normalised) * np.log1p(np.abs(normalised) / FLOW_KNEE) / np.log1p(1.0 / FLOW_KNEE)
    return np.repeat(np.clip(values, -1.0, 1.0).astype(np.float32)[:, None], 3, axis=1)


def count_clipped_flow(flow: np.ndarray, code: str = FLOW_CODE) -> int:
    """Count pixels of a flow `[2, H, W]` that the code clips: "log" those moving by more than the image's width or height."""
    reach = _LINEAR_REACH if code == "linear_75" else (1.0, 1.0)
    limits = np.array([reach[0] * flow.shape[-1], reach[1] * flow.shape[-2]])[:, None, None]
    return int((np.abs(flow) > limits).any(axis=0).sum())


def decode_flow(image: Any, axis: int, extent: int, code: str = FLOW_CODE) -> Any:
    """Image `[..., 3, h, w]` of flow along `axis` (0: x, 1: y) -> flow component `[..., h, w]` in pixels. Arrays or tensors.

    `extent`: width (x) or height (y), in pixels, of the image that the flow refers to: with the original's, the values
    are already those of the original, whatever the size of the map.
    """
    assert axis in (0, 1)
    values = image.mean(-3).clip(-1.0, 1.0)
    if code == "linear_75":
        return values * (_LINEAR_REACH[axis] * extent)
    magnitude = ((1.0 + 1.0 / FLOW_KNEE) ** abs(values) - 1.0) * FLOW_KNEE * extent
    return magnitude * (values > 0) - magnitude * (values < 0)


def mirror_flow(flow: np.ndarray) -> np.ndarray:
    """The flow `[2, H, W]` of the horizontally mirrored pair: mirrored, with u negated."""
    return np.ascontiguousarray(flow[..., ::-1]) * np.array([-1.0, 1.0], dtype=flow.dtype)[:, None, None]


# --- amodal segmentation ------------------------------------------------------------------------------------------------

AMODAL_GREY = 250
"""Grey level (0-255) up to which a pixel of the whole-on-white image counts as the object."""


def encode_amodal(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]` and the whole object's mask bool `[H, W]` -> image `[3, H, W]` of the object on white."""
    return image_to_float(visible_object(image, mask))


def decode_amodal(image: Any) -> Any:
    """Image `[..., 3, H, W]` -> the whole object mask, bool `[..., H, W]`: rounded ITU-R 601 luma <= 250. Arrays or tensors."""
    red, green, blue = (((image[..., c, :, :].clip(-1.0, 1.0) + 1.0) * 127.5).round() for c in range(3))
    return 0.299 * red + 0.587 * green + 0.114 * blue < AMODAL_GREY + 0.5


# --- codes --------------------------------------------------------------------------------------------------------------

TARGET_CODES = {"depth": DEPTH_CODES, "flow": FLOW_CODES}
"""Allowed codes of a task's targets; the first is the default. Manifests (`encoding`) and weights
(`config.json`) name it `depth_code` and `flow_code`, and `data_tools.encode` takes it as `--depth-code` and `--flow-code`."""


def target_code(task: str, said: Mapping[str, Any], source: str) -> str:
    """The code of a task's targets named by a manifest's `encoding` or the weights' sections; empty for tasks without one.

    UserError, naming `source`, if dpt does not know it.
    """
    if task not in TARGET_CODES:
        return ""
    known = TARGET_CODES[task]
    code = said.get(f"{task}_code") or known[0]
    if code not in known:
        raise UserError(f"{source}: {task} code {code!r} is unknown; it is one of {', '.join(known)}.")
    return str(code)


def codes_of(said: Mapping[str, Any], source: str) -> dict[str, str]:
    """`target_code` of every task that has one."""
    return {task: target_code(task, said, source) for task in TARGET_CODES}
