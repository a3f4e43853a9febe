"""The images that the embedded VAE learns from and is measured on."""

import numpy as np
import torch
from torch import Tensor

from data_tools.synthesis import SceneTruth, make_scene, render
from data_tools.vae_leaves import dead_leaves, noise_fields
from dpt.progress import progress
from dpt.target_codes import encode_amodal, encode_depth, encode_flow
from dpt.tasks import image_to_float, image_to_uint8, mask_image, resize_image

KIND_WEIGHTS = {
    "photo": 2.0,
    "leaves": 1.5,
    "texture": 0.4,
    "rgb": 0.3,
    "depth": 0.08,
    "flow": 0.035,
    "mask": 0.06,
    "whole": 0.07,
}
"""How often each kind of image is drawn, relative to the others; photos are the hardest and the fewest."""
SYNTHETIC = ("rgb", "depth", "flow", "mask", "whole")
"""The kinds that scenes give."""
RESOLUTION = 128
"""Side of the synthetic images, pixels."""


def scene_images(truth: SceneTruth) -> dict[str, list[np.ndarray]]:
    """Every image that the tasks make of a scene, by kind: float32 [3, H, W] in [-1, 1]."""
    return {
        "rgb": [image_to_float(truth.image), image_to_float(truth.next_image)],
        "depth": [encode_depth(truth.depth)[0]],
        "flow": list(encode_flow(truth.flow)),
        "mask": [mask_image(truth.visible_mask), mask_image(truth.whole_mask)],
        "whole": [encode_amodal(truth.whole, truth.whole_mask)],
    }


def synthetic_images(split: str, count: int, *, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """The images of `count` scenes, by kind, as uint8 [H, W, 3] to save memory."""
    images: dict[str, list[np.ndarray]] = {}
    for index in progress(range(count), f"rendering {split} scenes", "scene"):
        for kind, made in scene_images(render(make_scene(seed, split, index), RESOLUTION)).items():
            images.setdefault(kind, []).extend(image_to_uint8(image) for image in made)
    return images


def bundled_photos() -> dict[str, list[np.ndarray]]:
    """The training photos, uint8 [H, W, 3], those of surfaces and samples apart; the astronaut is not among them."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    photos = [data.coffee(), data.chelsea(), data.rocket(), *data.stereo_motorcycle()[:2], *load_sample_images().images]
    photos += [_grey(data.camera()), _grey(data.coins())]
    textures = [data.retina(), data.hubble_deep_field(), data.immunohistochemistry()]
    textures += [_grey(data.brick()), _grey(data.grass()), _grey(data.gravel())]
    return {"photo": photos, "texture": textures}


def _grey(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[..., None], 3, axis=-1)


def leaf_images(count: int, *, seed: int = 0) -> list[np.ndarray]:
    """Dead leaves of the photos' colours and textures, uint8 [H, W, 3]."""
    photos = [photo for kind in bundled_photos().values() for photo in kind]
    noises = noise_fields(np.random.default_rng(seed))
    numbers = progress(range(count), "painting dead leaves", "image")
    return [dead_leaves(np.random.default_rng([seed, number]), photos, noises) for number in numbers]


def astronaut() -> np.ndarray:
    """The held-out photo at 256 px, float32 [3, 256, 256] in [-1, 1]."""
    from skimage import data

    return image_to_float(resize_image(data.astronaut(), (256, 256)))


def sample_batch(
    images: dict[str, list[np.ndarray]], rng: np.random.Generator, count: int, crop: int, weights: dict[str, float]
) -> Tensor:
    """Augmented crops of images drawn by their kinds' weights: float32 [count, 3, crop, crop] in [-1, 1]."""
    kinds = [kind for kind in weights if images.get(kind)]
    shares = np.array([weights[kind] for kind in kinds])
    drawn = rng.choice(len(kinds), size=count, p=shares / shares.sum())
    crops = [_augment(images[kinds[k]][rng.integers(len(images[kinds[k]]))], rng, crop, kinds[k]) for k in drawn]
    return torch.from_numpy(np.stack(crops)).contiguous(memory_format=torch.channels_last)


def _augment(image: np.ndarray, rng: np.random.Generator, crop: int, kind: str) -> np.ndarray:
    """A crop at a random scale, mirrored and turned; colours vary too, except on white and in masks."""
    smallest, largest = min(crop, *image.shape[:2]), min(*image.shape[:2], 4 * crop)
    side = int(rng.integers(smallest, largest + 1))
    top, left = (int(rng.integers(extent - side + 1)) for extent in image.shape[:2])
    cut = resize_image(image[top : top + side, left : left + side], (crop, crop))
    values = np.rot90(image_to_float(cut), int(rng.integers(4)), axes=(1, 2))
    if rng.random() < 0.5:
        values = values[..., ::-1]
    if kind in ("depth", "flow"):
        values = values * rng.choice([-1.0, 1.0])
    elif kind in ("photo", "leaves", "texture", "rgb"):
        values = _vary_colors(values, rng)
    return np.ascontiguousarray(values, dtype=np.float32)


def _vary_colors(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another channel order, grey, contrast, brightness and tint, each now and then."""
    if rng.random() < 0.4:
        values = values[rng.permutation(3)]
    if rng.random() < 0.1:
        values = np.broadcast_to(values.mean(axis=0, keepdims=True), values.shape)
    if rng.random() < 0.4:
        centre = values.mean(axis=(1, 2), keepdims=True)
        values = (
            (values - centre) * rng.uniform(0.6, 1.4) + centre * rng.uniform(0.6, 1.2) + rng.uniform(-0.15, 0.15, (3, 1, 1))
        )
    return values.clip(-1.0, 1.0)
