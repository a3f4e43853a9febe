"""A reader's sample as the images that the VAE encodes and the arrays that are stored as they are."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.readers import ReadError, Sample
from dpt import tasks

DOWNSAMPLING = 8


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How samples are prepared; part of the identity of the shards."""

    task: str
    resolution: int
    """Side of the encoded square images, pixels."""
    mirrored: bool = False
    """Encode the mirrored image too (class images)."""
    evaluation: bool = False
    """Keep the input and the truth at their own size."""
    prompt: str = "all_valid"
    """Depth's second condition: "all_valid", "ground_truth" valid mask (as the paper's released code), or "none"."""
    fit: str = "stretch"
    """Perception inputs to a square: "stretch" both sides, or centre "crop"."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One sample, ready for the VAE."""

    key: str
    images: dict[str, NDArray[np.float32]]
    """Member -> images float32 [N, 3, R, R] in [-1, 1]."""
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


def prepare(sample: Sample, layout: Layout) -> Prepared:
    """Resize a sample and turn its truth into target images. ReadError if it has no usable truth."""
    height, width = sample.images[0].shape[:2]
    meta = {"width": width, "height": height, "class_name": sample.class_name or "", **sample.meta}
    if layout.task == "class":
        return _prepare_class(sample, layout, meta)
    box = _crop_box(height, width) if layout.fit == "crop" else (0, 0, height, width)
    size = (layout.resolution, layout.resolution)
    conditions = [tasks.image_to_float(tasks.resize_image(_cut(i, box), size)) for i in sample.images]
    valid = np.ones((height, width), dtype=np.bool_) if sample.valid is None else sample.valid
    arrays: dict[str, NDArray[Any]] = {}
    if layout.task == "depth":
        assert sample.depth is not None
        valid = valid & (sample.depth > 0)
        depth, mask = _cut(sample.depth, box), _cut(valid, box)
        if not mask.any():
            raise ReadError(sample.key, Path(str(meta.get("source", ""))), "no pixel has a valid depth")
        image, constants = tasks.encode_depth(tasks.resize_nearest(depth, size), tasks.resize_nearest(mask, size))
        targets = [image]
        if layout.prompt == "all_valid":
            conditions.append(tasks.all_valid_prompt(*size))
        elif layout.prompt == "ground_truth":
            conditions.append(tasks.mask_image(tasks.resize_nearest(mask, size)))
        meta |= {"near": constants[0], "far": constants[1]}
        truth: NDArray[Any] = np.where(valid, sample.depth, np.float32(0)).astype(np.float32)
    elif layout.task == "flow":
        assert sample.flow is not None
        targets = list(tasks.encode_flow(tasks.resize_flow(_cut(sample.flow, box), size)))
        meta["clipped_pixels"] = tasks.count_clipped_flow(sample.flow)
        truth = sample.flow.astype(np.float32)
    else:
        assert sample.mask is not None
        whole = sample.whole if sample.whole is not None else np.where(sample.mask[..., None], sample.images[0], np.uint8(255))
        targets = [tasks.image_to_float(tasks.resize_image(_cut(whole, box), size))]
        truth = sample.mask.astype(np.uint8)
    arrays["valid"] = tasks.latent_valid(tasks.resize_nearest(_cut(valid, box), size), factor=DOWNSAMPLING)
    if layout.evaluation:
        arrays |= {"image": sample.images[0], "truth": truth}
    images = {"cond_latents": np.stack(conditions), "target_latents": np.stack(targets)}
    return Prepared(key=sample.key, images=images, arrays=arrays, meta=meta)


def _prepare_class(sample: Sample, layout: Layout, meta: dict[str, Any]) -> Prepared:
    assert sample.label is not None
    image = tasks.image_to_float(centre_crop(sample.images[0], layout.resolution))
    images = {"latents": image[None]}
    if layout.mirrored:
        images["latents_mirrored"] = np.ascontiguousarray(image[None, ..., ::-1])
    return Prepared(key=sample.key, images=images, arrays={"label": np.asarray(sample.label, dtype=np.int64)}, meta=meta)


def centre_crop(image: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] -> [R, R, 3]: halved while both sides allow it, resized by the short side, cropped at the centre.

    The preprocessing of ADM and DiT (Dhariwal & Nichol 2021), so that shards are comparable with public checkpoints.
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * resolution:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = resolution / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - resolution) // 2, (picture.height - resolution) // 2
    return np.asarray(picture.crop((left, top, left + resolution, top + resolution)))


def _crop_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height, width of the largest centred square."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _cut(values: NDArray[Any], box: tuple[int, int, int, int]) -> NDArray[Any]:
    """Images [H, W, 3], maps [H, W] or flow [2, H, W], cut to the box."""
    top, left, height, width = box
    rows, cols = slice(top, top + height), slice(left, left + width)
    return values[rows, cols] if values.ndim == 2 or values.shape[-1] == 3 else values[:, rows, cols]
