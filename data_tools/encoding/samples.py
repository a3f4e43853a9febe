"""A reader's sample as the images that the VAE encodes and the arrays that are stored as they are."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.readers import ReadError, Sample
from dpt import target_codes, tasks
from dpt.fits import How

Prompt = Literal["all_valid", "ground_truth", "none"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How samples are prepared; part of the identity of the shards."""

    task: str
    resolution: int
    """Side of the encoded square images, pixels; with fit "aspect", their longer side."""
    downsampling: int = 8
    """Pixels per latent, along a side."""
    mirrored: bool = False
    """Encode every sample mirrored too: a second member of a class sample, a second sample of a perception set."""
    evaluation: bool = False
    """Keep the input and the truth at their original size."""
    prompt: Prompt = "all_valid"
    """Depth's second condition: an all-valid mask, the ground truth's (as the paper's released code), or none."""
    fit: How = "stretch"
    """Perception inputs' fit to `resolution`: both sides stretched to the square, its centre cropped, the whole padded, or none
    of these: the aspect kept, sides rounded to two latents (16 pixels behind an 8x VAE)."""
    depth_code: str = target_codes.DEPTH_CODE
    """How depth becomes images: one of `target_codes.DEPTH_CODES`."""
    flow_code: str = target_codes.FLOW_CODE
    """How flow becomes images: one of `target_codes.FLOW_CODES`."""
    clip: bool = False
    """Keep the visible object as a picture, for its CLIP embedding (amodal)."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One sample, ready for the VAE."""

    key: str
    images: Mapping[str, list[NDArray[Any]]]
    """Member -> its images, uint8 `[H, W, 3]` or float32 `[3, H, W]` in [-1, 1]."""
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    all_valid_prompt: bool = False
    """The last condition is the all-valid prompt, which is not among the images: it is the same for all."""
    visible: NDArray[np.uint8] | None = None
    """uint8 `[H, W, 3]`: the visible object on white."""


class Features(Protocol):
    """Source of the features of samples (`data_tools.encoding.features`)."""

    name: str
    channels: int
    grid: tuple[int, int]
    """Rows and columns of a sample's features."""

    def __call__(self, key: str, layout: Layout, *, mirrored: bool) -> NDArray[np.float16]:
        """Features of the sample `key`, or of its mirror image: float16 `[channels, *grid]`. ReadError if there are none."""
        ...


def prepare(sample: Sample, layout: Layout, features: Features | None = None) -> list[Prepared]:
    """A sample (and its mirror image, if asked for) resized, with its truth as target images, and its `features` if given.
    ReadError if it has none of those."""
    if layout.task == "class":
        found = [_prepare_class(sample, layout)]
    else:
        found = [_prepare_perception(sample, layout)]
        if layout.mirrored:
            found.append(_prepare_perception(mirror(sample, layout.task), layout))
    if features is None:
        return found
    values = [features(sample.key, layout, mirrored=bool(number)) for number in range(len(found))]
    return [
        dataclasses.replace(one, arrays={**one.arrays, "features": value}) for one, value in zip(found, values, strict=True)
    ]


def mirror(sample: Sample, task: str) -> Sample:
    """The sample mirrored, under its own key."""
    mirrored_truth = tasks.task_spec(task).mirror

    def flipped(values: Any, axis: int = -1) -> Any:
        return None if values is None else np.ascontiguousarray(np.flip(values, axis))

    return dataclasses.replace(
        sample,
        key=f"{sample.key}_mirrored",
        images=tuple(flipped(image, 1) for image in sample.images),
        depth=flipped(sample.depth),
        flow=None if sample.flow is None else target_codes.mirror_flow(sample.flow),
        mask=flipped(sample.mask),
        truth=None if sample.truth is None or mirrored_truth is None else mirrored_truth(sample.truth),
        valid=flipped(sample.valid),
        whole=flipped(sample.whole, 1),
        meta={**sample.meta, "mirrored": True},
    )


def _meta(sample: Sample, **further: Any) -> dict[str, Any]:
    height, width = sample.images[0].shape[:2]
    return {"width": width, "height": height, "class_name": sample.class_name or "", **sample.meta, **further}


def _unusable(sample: Sample, reason: str) -> ReadError:
    return ReadError(sample.key, Path(str(sample.meta.get("source", ""))), reason)


def _prepare_class(sample: Sample, layout: Layout) -> Prepared:
    assert sample.label is not None
    image = tasks.centre_crop(sample.images[0], layout.resolution)
    images = {"latents": [image]}
    if layout.mirrored:
        images["latents_mirrored"] = [np.ascontiguousarray(image[:, ::-1])]
    return Prepared(key=sample.key, images=images, arrays={"label": np.asarray(sample.label, np.int64)}, meta=_meta(sample))


def _prepare_perception(sample: Sample, layout: Layout) -> Prepared:
    height, width = sample.images[0].shape[:2]
    frame = Frame(height, width, layout)
    conditions = [frame.image(image) for image in sample.images]
    valid = np.ones((height, width), np.bool_) if sample.valid is None else sample.valid
    further: dict[str, Any] = {}
    truth: NDArray[Any]
    if layout.task == "depth":
        assert sample.depth is not None
        valid = valid & (sample.depth > 0)
        truth = np.where(valid, sample.depth, np.float32(0)).astype(np.float32)
        known = frame.nearest(valid)
        if not known.any():
            raise _unusable(sample, "no pixel has a valid depth")
        target, (further["near"], further["far"]) = target_codes.encode_depth(
            frame.nearest(truth), known, code=layout.depth_code
        )
        targets = [target]
        if layout.prompt == "ground_truth":
            conditions.append(tasks.image_to_uint8(tasks.mask_image(known)))
    elif layout.task == "flow":
        assert sample.flow is not None
        truth = sample.flow.astype(np.float32)
        targets = list(target_codes.encode_flow(frame.flow(truth, smooth=bool(valid.all())), layout.flow_code))
        further["clipped_pixels"] = target_codes.count_clipped_flow(sample.flow, layout.flow_code)
    elif (encode := tasks.task_spec(layout.task).encode) is not None:
        if sample.truth is None:
            raise _unusable(sample, "its reader gives no truth")
        truth = np.where(valid, sample.truth, np.float32(np.nan)).astype(np.float32)
        targets = list(encode(frame.nearest(np.where(valid, sample.truth, np.float32(0)).astype(np.float32))))
    else:
        assert sample.mask is not None
        truth = sample.mask.astype(np.uint8)
        on_white = np.where(sample.mask[..., None], sample.images[0], np.uint8(255))
        targets = [frame.image(on_white if sample.whole is None else sample.whole, fill=255)]
    arrays: dict[str, NDArray[Any]] = {"valid": tasks.latent_valid(frame.nearest(valid), factor=layout.downsampling)}
    if layout.evaluation:
        arrays |= {"image": sample.images[0], "truth": truth}
        if layout.task == "flow":
            arrays["second"] = sample.images[1]
        elif layout.task == "amodal":
            arrays["visible_mask"] = (sample.images[1][..., 0] > 127).astype(np.uint8)
        if sample.whole is not None:
            arrays["code_mask"] = target_codes.decode_amodal(tasks.image_to_float(sample.whole)).astype(np.uint8)
    visible = None
    if layout.clip:
        visible = tasks.visible_object(sample.images[0], sample.images[1][..., 0] > 127)
    return Prepared(
        key=sample.key,
        images={"cond_latents": conditions, "target_latents": targets},
        arrays=arrays,
        meta=_meta(sample, **further),
        all_valid_prompt=layout.task == "depth" and layout.prompt == "all_valid",
        visible=visible,
    )


class Frame:
    """Brings maps of one size to the encoded size."""

    def __init__(self, height: int, width: int, layout: Layout) -> None:
        side = layout.resolution
        self.top = self.left = 0
        self.cut = (height, width)
        self.size = self.canvas = (side, side)
        if layout.fit == "aspect":
            self.size = self.canvas = tasks.fit_size(height, width, side, multiple=2 * layout.downsampling)
        elif layout.fit == "crop":
            self.cut = (min(height, width),) * 2
            self.top, self.left = (height - self.cut[0]) // 2, (width - self.cut[1]) // 2
        elif layout.fit == "pad":  # to the right and below, in whole latents
            self.size = tasks.fit_size(height, width, side, multiple=layout.downsampling)

    def _part(self, values: NDArray[Any]) -> NDArray[Any]:
        """[..., H, W] -> the part that is kept."""
        return values[..., self.top : self.top + self.cut[0], self.left : self.left + self.cut[1]]

    def _padded(self, values: NDArray[Any], fill: Any) -> NDArray[Any]:
        if self.size == self.canvas:
            return values
        rows, cols = self.canvas[0] - self.size[0], self.canvas[1] - self.size[1]
        return np.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, rows), (0, cols)], constant_values=fill)

    def image(self, image: NDArray[np.uint8], fill: int = 0) -> NDArray[np.uint8]:
        """An image uint8 [H, W, 3], resized smoothly."""
        part = np.moveaxis(self._part(np.moveaxis(image, -1, 0)), 0, -1)
        resized = tasks.resize_image(np.ascontiguousarray(part), self.size)
        return np.ascontiguousarray(np.moveaxis(self._padded(np.moveaxis(resized, -1, 0), fill), 0, -1))

    def nearest(self, values: NDArray[Any]) -> NDArray[Any]:
        """Maps [..., H, W], resized without mixing values; 0 where padded."""
        return self._padded(tasks.resize_nearest(self._part(values), self.size), 0)

    def flow(self, flow: NDArray[np.float32], smooth: bool) -> NDArray[np.float32]:
        """Flow [2, H, W], in pixels of the new size; 0 where padded."""
        return self._padded(tasks.resize_flow(self._part(flow), self.size, smooth=smooth), 0)
