"""The scenes that the tiny sets show."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from data_tools.synthesis.generation import make_scene
from data_tools.synthesis.rendering import SceneTruth, render

WIDTH, HEIGHT = 64, 48
"""Size of every picture except pix2gestalt's, which are square."""
_LEAST_SEEN = 12
"""Least number of the hidden object's pixels that a picture shows."""


def scenes(seed: int, split: str, count: int) -> list[SceneTruth]:
    """Scenes of WIDTH x HEIGHT pixels, each showing a partly hidden object."""
    shown = (_cut(truth) for truth in square_scenes(seed, split))
    return list(itertools.islice((truth for truth in shown if truth.visible_mask.sum() >= _LEAST_SEEN), count))


def square_scenes(seed: int, split: str) -> Iterator[SceneTruth]:
    """Endless scenes of WIDTH x WIDTH pixels."""
    return (render(make_scene(seed, split, index), WIDTH) for index in itertools.count())


def _cut(truth: SceneTruth) -> SceneTruth:
    """The middle rows."""
    top = (WIDTH - HEIGHT) // 2
    rows = slice(top, top + HEIGHT)
    names = ("image", "next_image", "depth", "visible_mask", "whole_mask", "whole")
    maps: dict[str, Any] = {name: np.ascontiguousarray(getattr(truth, name)[rows]) for name in names}
    return replace(truth, **maps, flow=truth.flow[:, rows])
