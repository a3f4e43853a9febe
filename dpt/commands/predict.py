"""Predict depth, optical flow or whole-object masks of pictures with trained weights."""

import argparse
from pathlib import Path

import numpy as np

from dpt.commands.options import add_sampling_options, sampling_config
from dpt.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="pictures of any size")
    parser.add_argument("--task", choices=("depth", "flow", "amodal"), help="(default: what the weights are for)")
    parser.add_argument("--second", nargs="+", type=Path, default=[], help="flow: the second frame of each picture")
    parser.add_argument("--mask", nargs="+", type=Path, default=[], help="amodal: the visible mask of each picture's object")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=0, help="longest side shown to the network (default: as trained)")
    parser.add_argument("--ensemble", type=int, default=1, help="predictions that are merged (default: %(default)s)")
    add_sampling_options(parser, steps=50, guidance=1.0)


def run(arguments: argparse.Namespace) -> None:
    from dpt.evaluation.outputs import write_outputs
    from dpt.evaluation.prediction import Predictor

    if arguments.second and arguments.mask:
        raise UserError("--second is for flow and --mask for amodal; give one of them.")
    images = [_read_picture(path) for path in arguments.images]
    others = [_read_picture(p) for p in arguments.second] or [_read_picture(p)[..., 0] > 127 for p in arguments.mask]
    names = _unique_names(arguments.images)
    predictor = Predictor(arguments.weights, config=sampling_config(arguments), vae=arguments.vae, device=arguments.device)
    task = arguments.task or predictor.task
    predictions = predictor(images, task=task, others=others or None, keys=names, resolution=arguments.resolution)
    for name, image, prediction in zip(names, images, predictions, strict=True):
        for path in write_outputs(prediction, task, image, arguments.out, name):
            print(path)


def _read_picture(path: Path) -> np.ndarray:
    """uint8 `[H, W, 3]`; UserError if the file is no picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path}: not a picture that can be read ({error}).") from error


def _unique_names(paths: list[Path]) -> list[str]:
    """The files' names without suffix, numbered where two are the same."""
    stems = [p.stem for p in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}_{stems[:i].count(stem)}" for i, stem in enumerate(stems)]
