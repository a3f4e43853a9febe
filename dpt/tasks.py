"""A task: its conditions, targets and labels, and how a target becomes an image and back.

Shared by the offline encoder and by the evaluator, so that what one writes the other reads. Needs numpy only; the decoders
also take torch tensors (any device) and return tensors. Images are float32 `[3, H, W]` in [-1, 1] unless said otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dpt.config.sections import CONDITIONS
from dpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What a task reads and writes. A model with fewer condition inputs takes the first ones."""

    name: str
    conditions: tuple[str, ...]
    """Condition images, in the order of `cond_latents`."""
    targets: tuple[str, ...]
    """Target images, in the order of `target_latents`; a prediction takes one pass for each, with the same seeds."""
    encode: Callable[[np.ndarray], np.ndarray] | None = None
    """Of registered tasks: truth float32 `[C, H, W]`, 0 where unknown -> images `[M, 3, H, W]` in [-1, 1], one a target."""
    decode: Callable[[Any], Any] | None = None
    """Of registered tasks: images `[..., M, 3, H, W]` -> values `[..., C, H, W]`, tensors."""
    finish: Callable[[np.ndarray], np.ndarray] | None = None
    """Of registered tasks: merged and resized values float32 `[C, H, W]` -> the prediction; None: they are it."""
    mirror: Callable[[np.ndarray], np.ndarray] | None = None
    """Of registered tasks: a truth `[C, H, W]` -> that of the mirrored picture; None: sets of it cannot be encoded mirrored."""

    @property
    def registered(self) -> bool:
        """Whether it is a user's."""
        return self.encode is not None


TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(name="class", conditions=(), targets=("image",)),
        TaskSpec(name="depth", conditions=("rgb", "prompt"), targets=("depth",)),
        TaskSpec(name="amodal", conditions=("rgb", "visible_mask"), targets=("whole",)),
        TaskSpec(name="flow", conditions=("first", "second"), targets=("flow_x", "flow_y")),
    )
}

_TASK_LABELS: dict[str, tuple[str, ...]] = {
    "class": (),
    "depth": (),
    "amodal": (),
    "flow": ("flow_x", "flow_y"),
    "generalist": ("depth", "whole", "flow_x", "flow_y"),
}


def register_task(spec: TaskSpec) -> None:
    """Add a dense task that predicts values `[C, H, W]` from one picture, for recipes, shards, evaluation and prediction.

    Beside it, `dpt.evaluation.protocols.register_protocol` says how it is scored and `data_tools.readers.register_reader` where
    its data come from (docs/own_task.md). UserError if the name is taken, or the task is not such a one.
    """
    if spec.name in CONDITIONS:
        raise UserError(f"task {spec.name!r} is there already; choose another name.")
    if spec.conditions != ("rgb",) or not spec.targets or spec.encode is None or spec.decode is None:
        raise UserError(f'task {spec.name!r}: it needs conditions ("rgb",), targets, encode and decode; give them.')
    TASKS[spec.name] = spec
    _TASK_LABELS[spec.name] = spec.targets if len(spec.targets) > 1 else ()
    CONDITIONS[spec.name] = (1, 1)


def task_spec(name: str) -> TaskSpec:
    """The task called `name`; UserError if there is none."""
    if name not in TASKS:
        raise UserError(
            f"task {name!r} is unknown; choose one of {', '.join(TASKS)}, or name the file that registers it in DPT_PLUGINS."
        )
    return TASKS[name]


def num_task_labels(trained_task: str) -> int:
    """Label rows that a model trained for `trained_task` has beside its classes: they are its last ids before the null label.

    A specialist with one target has none: it is trained and asked with the null label.
    """
    if trained_task not in _TASK_LABELS:
        raise UserError(f"task {trained_task!r} is unknown; choose one of {', '.join(_TASK_LABELS)}.")
    return len(_TASK_LABELS[trained_task])


def label_id(target: str, *, trained_task: str, num_classes: int) -> int:
    """Label under which a model trained for `trained_task` predicts `target`.

    `num_classes` counts the task labels too (`ModelConfig.num_classes`; the null label's id). A generalist on ImageNet's
    1000 classes has num_classes 1004: depth 1000, whole (amodal) 1001, flow_x 1002, flow_y 1003.
    """
    labels = _TASK_LABELS[trained_task] if num_task_labels(trained_task) else ()
    if target in labels:
        return num_classes - len(labels) + labels.index(target)
    if trained_task in TASKS and target in TASKS[trained_task].targets:
        return num_classes
    raise UserError(f"a model trained for {trained_task!r} cannot predict {target!r}; choose weights trained for it.")


# --- images -------------------------------------------------------------------------------------------------------------


def image_to_float(image: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]` -> float32 `[3, H, W]` in [-1, 1]."""
    return np.ascontiguousarray(np.moveaxis(image, -1, 0), dtype=np.float32) / 127.5 - 1.0


def image_to_uint8(image: np.ndarray) -> np.ndarray:
    """float `[3, H, W]` in [-1, 1] (clipped) -> uint8 `[H, W, 3]`."""
    return np.ascontiguousarray(np.moveaxis(np.rint((image.clip(-1.0, 1.0) + 1.0) * 127.5).astype(np.uint8), 0, -1))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 `[H, W, 3]` (or `[H, W]`) to `size` (h, w): bicubic, antialiased when it shrinks."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def centre_crop(image: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 `[H, W, 3]` -> `[R, R, 3]`: halved while both sides allow it, resized by the short side, cropped at the centre.

    The preprocessing of ADM and DiT (Dhariwal & Nichol 2021), so that shards are comparable with public checkpoints.
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * resolution:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = resolution / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - resolution) // 2, (picture.height - resolution) // 2
    return np.asarray(picture.crop((left, top, left + resolution, top + resolution)))


def resize_smooth(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float `[..., H, W]` to `size` (h, w): bilinear, antialiased when it shrinks. For predictions; it mixes across edges."""
    if values.shape[-2:] == tuple(size):
        return np.asarray(values, dtype=np.float32)
    planes = np.asarray(values, dtype=np.float32).reshape(-1, *values.shape[-2:])
    resized = [np.asarray(Image.fromarray(p).resize((size[1], size[0]), Image.Resampling.BILINEAR)) for p in planes]
    return np.stack(resized).reshape(*values.shape[:-2], *size)


def resize_nearest(values: Any, size: tuple[int, int]) -> Any:
    """Array or tensor `[..., H, W]` of any dtype to `size` (h, w), nearest pixel: mixes no values. For depth and masks."""
    height, width = values.shape[-2:]
    rows = ((np.arange(size[0]) + 0.5) * height / size[0]).astype(np.int64)
    cols = ((np.arange(size[1]) + 0.5) * width / size[1]).astype(np.int64)
    return values[..., rows[:, None], cols[None, :]]


def resize_flow(flow: np.ndarray, size: tuple[int, int], *, smooth: bool = True) -> np.ndarray:
    """Flow float `[..., 2, H, W]` in pixels to `size` (h, w), in pixels of that size: u scales with width, v with height."""
    height, width = flow.shape[-2:]
    resized = resize_smooth(flow, size) if smooth else resize_nearest(flow, size)
    return resized * np.array([size[1] / width, size[0] / height], dtype=np.float32)[:, None, None]


def fit_size(height: int, width: int, resolution: int, *, multiple: int = 16) -> tuple[int, int]:
    """(h, w) with about the same aspect whose longer side is `resolution`, both rounded to multiples of `multiple`.

    16 pixels are one token at patch size 2 behind an 8x VAE.
    """
    scale = resolution / max(height, width)
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))  # type: ignore[return-value]


def latent_valid(valid: np.ndarray, *, factor: int = 8) -> np.ndarray:
    """bool `[H, W]` -> uint8 `[H / factor, W / factor]`: 1 where every pixel under the latent is valid."""
    height, width = valid.shape
    blocks = valid.reshape(height // factor, factor, width // factor, factor)
    return np.asarray(blocks.all(axis=(1, 3)), dtype=np.uint8)


def mask_image(mask: np.ndarray) -> np.ndarray:
    """bool `[H, W]` -> image `[3, H, W]`: 1 inside, -1 outside. The prompt of amodal segmentation."""
    return np.repeat(np.where(mask, np.float32(1), np.float32(-1))[None], 3, axis=0)


def all_valid_prompt(height: int, width: int) -> np.ndarray:
    """The depth prompt `[3, H, W]`: the image of an all-true mask.

    The authors' released code feeds the ground truth's valid mask here, which leaks ground truth at test time.
    """
    return np.ones((3, height, width), dtype=np.float32)


DEPTH_PROMPT = "all_valid"
"""What depth's second condition shows, unless one is told otherwise, and what predictions are given."""
DEPTH_PROMPTS = (DEPTH_PROMPT, "ground_truth")
"""all_valid: `all_valid_prompt`. ground_truth: where the truth is known, as in the authors' released code."""


def check_depth_prompt(prompt: str, source: str) -> str:
    """`prompt` itself; UserError, naming `source`, if it is none."""
    if prompt not in DEPTH_PROMPTS:
        raise UserError(f"{source}: depth prompt {prompt!r} is unknown; it is one of {', '.join(DEPTH_PROMPTS)}.")
    return prompt


# --- depth --------------------------------------------------------------------------------------------------------------

DEPTH_CODE = "linear"
"""How depth is coded, unless one is told otherwise: as in the paper."""
DEPTH_CODES = (DEPTH_CODE, "log", "disparity")
"""linear: depth itself; log, disparity: finer where it is near (see `encode_depth`)."""
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
    Elsewhere too they come back as u exactly, which is depth up to scale and shift, as protocols score it; the logarithm itself
    would need far / near to be decoded, which no prediction knows. Near is -1 in every code, and invalid pixels are. UserError
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
    """Image `[..., 3, H, W]` -> affine-invariant depth `[..., H, W]` in [0, 1], whatever its `code`. Arrays or tensors."""
    return uncode_depth((image.mean(-3).clip(-1.0, 1.0) + 1.0) / 2.0, code)


def uncode_depth(values: Any, code: str) -> Any:
    """Coded depth in [0, 1] -> depth in [0, 1], up to scale and shift. Numbers, arrays or tensors."""
    if code == "log":
        return (DEPTH_SPREAD**values - 1.0) / (DEPTH_SPREAD - 1.0)
    if code == "disparity":
        return values / (DEPTH_SPREAD - (DEPTH_SPREAD - 1.0) * values)
    return values


def depth_code_slope(unit_depth: Any, code: str) -> Any:
    """How fast coded depth rises with depth, both in [0, 1], at depth `unit_depth`. Numbers, arrays or tensors."""
    growth = 1.0 + (DEPTH_SPREAD - 1.0) * unit_depth
    if code == "log":
        return (DEPTH_SPREAD - 1.0) / np.log(DEPTH_SPREAD) / growth
    if code == "disparity":
        return DEPTH_SPREAD / growth**2
    return unit_depth * 0.0 + 1.0


def metric_depth(unit_depth: Any, constants: tuple[float, float]) -> Any:
    """Undo `encode_depth`'s normalisation: depth in [0, 1] -> metres, with its (near, far)."""
    near, far = constants
    return near + unit_depth * (far - near)


# --- optical flow -------------------------------------------------------------------------------------------------------

FLOW_KNEE = 1.0 / 16.0
"""Motion, as a fraction of the image's side, below which the flow code is about linear and above which it is logarithmic."""


FLOW_CODE = "log"
"""How this version codes flow, unless it is told otherwise."""
FLOW_CODES = (FLOW_CODE, "linear_75")
"""log: see `encode_flow`. linear_75: u / 75, v / 75 in pixels of FlyingChairs' 512 x 384 frames, as the released generalist."""
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
    """Pixels of a flow `[2, H, W]` that the code clips: "log" those that move by more than the image's width or height."""
    reach = _LINEAR_REACH if code == "linear_75" else (1.0, 1.0)
    limits = np.array([reach[0] * flow.shape[-1], reach[1] * flow.shape[-2]])[:, None, None]
    return int((np.abs(flow) > limits).any(axis=0).sum())


def decode_flow(image: Any, axis: int, extent: int, code: str = FLOW_CODE) -> Any:
    """Image `[..., 3, h, w]` of flow along `axis` (0: x, 1: y) -> flow component `[..., h, w]` in pixels. Arrays or tensors.

    `extent`: width (x) or height (y), in pixels, of the image that the flow shall refer to: with the original's, the values
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


# --- codes --------------------------------------------------------------------------------------------------------------

TARGET_CODES = {"depth": DEPTH_CODES, "flow": FLOW_CODES}
"""How the targets of a task may be coded; the first is meant where nothing is said. Manifests (`encoding`) and weights
(`config.json`) name it `depth_code` and `flow_code`, and `data_tools.encode` takes it as `--depth-code` and `--flow-code`."""


def target_code(task: str, said: Mapping[str, Any], source: str) -> str:
    """The code of a task's targets that a manifest's `encoding` or the sections of weights name; empty for tasks without one.

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


# --- amodal segmentation ------------------------------------------------------------------------------------------------


def visible_object(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]` and the visible mask bool `[H, W]` -> the visible part on white, which CLIP embeds."""
    return np.where(mask[..., None], image, np.uint8(255))


AMODAL_GREY = 250
"""Grey level (0-255) up to which a pixel of the whole-on-white image counts as the object."""


def encode_amodal(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]` and the whole object's mask bool `[H, W]` -> image `[3, H, W]` of the object on white."""
    return image_to_float(np.where(mask[..., None], image, np.uint8(255)))


def decode_amodal(image: Any) -> Any:
    """Image `[..., 3, H, W]` -> the whole object mask, bool `[..., H, W]`: rounded ITU-R 601 luma <= 250. Arrays or tensors."""
    red, green, blue = (((image[..., c, :, :].clip(-1.0, 1.0) + 1.0) * 127.5).round() for c in range(3))
    return 0.299 * red + 0.587 * green + 0.114 * blue < AMODAL_GREY + 0.5
