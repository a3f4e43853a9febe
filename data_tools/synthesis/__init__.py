"""Procedural 3-D scenes with exact ground truth, written in the layouts of the real data sets."""

from data_tools.synthesis.generation import SPLITS, make_scene
from data_tools.synthesis.rendering import SceneTruth, render
from data_tools.synthesis.scenes import Scene
from data_tools.synthesis.shapes import CLASS_NAMES

__all__ = ["CLASS_NAMES", "SPLITS", "Scene", "SceneTruth", "make_scene", "render"]
