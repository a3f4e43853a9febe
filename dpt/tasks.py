"""Tasks: their conditions, targets and labels; and pictures as arrays, brought to the networks' range and size.

`dpt.target_codes` says how targets become images and back. Needs numpy and Pillow only. Images are float32 `[3, H, W]` in
[-1, 1] unless said otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dpt.config.sections import CONDITIONS
from dpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task's inputs and outputs. A model with fewer condition inputs takes the first ones."""

    name: str
    conditions: tuple[str, ...]
    """Condition images, in the order of `cond_latents`."""
    targets: tuple[str, ...]
    """Target images, in the order of `target_latents`; prediction takes one pass for each, with the same seeds."""
    encode: Callable[[np.ndarray], np.ndarray] | None = None
    """Registered tasks' encoder: truth float32 `[C, H, W]`, 0: unknown -> images `[M, 3, H, W]` in [-1, 1], one per target."""
    decode: Callable[[Any], Any] | None = None
    """Registered tasks' decoder: images `[..., M, 3, H, W]` -> values `[..., C, H, W]`, tensors."""
    finish: Callable[[np.ndarray], np.ndarray] | None = None
    """Registered tasks' last step: merged and resized values float32 `[C, H, W]` -> the prediction; None: unchanged."""
    mirror: Callable[[np.ndarray], np.ndarray] | None = None
    """Registered tasks' mirroring: truth `[C, H, W]` -> the mirrored picture's; None: sets cannot be encoded mirrored."""

    @property
    def registered(self) -> bool:
        """Whether the task is a user's."""
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
    its data come from (docs/own_task.md). UserError if the name is taken, or the task is of another kind.
    """
    if spec.name in CONDITIONS:
        raise UserError(f"task {spec.name!r} already exists; choose another name.")
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
    """Number of label rows of a model trained for `trained_task` beside its classes: its last ids before the null label.

    A specialist with one target has none: it is trained and queried with the null label.
    """
    if trained_task not in _TASK_LABELS:
        raise UserError(f"task {trained_task!r} is unknown; choose one of {', '.join(_TASK_LABELS)}.")
    return len(_TASK_LABELS[trained_task])


def label_id(target: str, *, trained_task: str, num_classes: int) -> int:
    """The label under which a model trained for `trained_task` predicts `target`.

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
    """Resize uint8 `[H, W, 3]` (or `[H, W]`) to `size` (h, w): bicubic, antialiased when shrinking."""
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
    """Resize float `[..., H, W]` to `size` (h, w): bilinear, antialiased if smaller. For predictions; mixes across edges."""
    if values.shape[-2:] == tuple(size):
        return np.asarray(values, dtype=np.float32)
    planes = np.asarray(values, dtype=np.float32).reshape(-1, *values.shape[-2:])
    resized = [np.asarray(Image.fromarray(p).resize((size[1], size[0]), Image.Resampling.BILINEAR)) for p in planes]
    return np.stack(resized).reshape(*values.shape[:-2], *size)


def resize_nearest(values: Any, size: tuple[int, int]) -> Any:
    """Resize an array or tensor `[..., H, W]` of any dtype to `size` (h, w), nearest pixel: no mixing. For depth and masks."""
    height, width = values.shape[-2:]
    rows = ((np.arange(size[0]) + 0.5) * height / size[0]).astype(np.int64)
    cols = ((np.arange(size[1]) + 0.5) * width / size[1]).astype(np.int64)
    return values[..., rows[:, None], cols[None, :]]


def resize_flow(flow: np.ndarray, size: tuple[int, int], *, smooth: bool = True) -> np.ndarray:
    """Resize flow float `[..., 2, H, W]` in pixels to `size` (h, w), in its pixels: u scales with width, v with height."""
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
"""The default of depth's second condition, always used in prediction."""
DEPTH_PROMPTS = (DEPTH_PROMPT, "ground_truth")
"""all_valid: `all_valid_prompt`. ground_truth: the mask of known truth, as in the authors' released code."""


def check_depth_prompt(prompt: str, source: str) -> str:
    """Return `prompt` itself; UserError, naming `source`, if it is invalid."""
    if prompt not in DEPTH_PROMPTS:
        raise UserError(f"{source}: depth prompt {prompt!r} is unknown; it is one of {', '.join(DEPTH_PROMPTS)}.")
    return prompt


def visible_object(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]` and an object's mask bool `[H, W]` -> the object on white; CLIP embeds its visible part."""
    return np.where(mask[..., None], image, np.uint8(255))
