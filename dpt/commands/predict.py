"""Predict depth, optical flow or whole-object masks of pictures with trained weights."""

import argparse
from pathlib import Path

from dpt.commands.options import add_sampling_options, sampling_config
from dpt.errors import UserError
from dpt.pictures import read_mask, read_picture
from dpt.tasks import visible_object


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="pictures of any size")
    parser.add_argument("--task", choices=("depth", "flow", "amodal"), help="(default: what the weights are for)")
    parser.add_argument("--second", nargs="+", type=Path, default=[], help="flow: the second frame of each picture")
    parser.add_argument("--mask", nargs="+", type=Path, default=[], help="amodal: the visible mask of each picture's object")
    parser.add_argument("--clip", default="", metavar="FOLDER", help="amodal: CLIP image tower, if the weights need one")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=0, help="longest side shown to the network (default: as trained)")
    parser.add_argument("--ensemble", type=int, default=1, help="predictions that are merged (default: %(default)s)")
    add_sampling_options(parser, steps=50, guidance=1.0)


def run(arguments: argparse.Namespace) -> None:
    from dpt.clip import load_clip
    from dpt.evaluation.outputs import write_outputs
    from dpt.evaluation.prediction import Predictor
    from dpt.training.export import load_weights

    if arguments.second and arguments.mask:
        raise UserError("--second is for flow and --mask for amodal; give one of them.")
    if arguments.clip and len(arguments.mask) != len(arguments.images):
        raise UserError(
            f"--clip embeds visible objects: give a --mask for each picture ({len(arguments.images)} pictures, "
            f"{len(arguments.mask)} masks)."
        )
    images = [read_picture(path) for path in arguments.images]
    others = [read_picture(p) for p in arguments.second] or [read_mask(p) for p in arguments.mask]
    for path, image, other in zip(arguments.images, images, others, strict=False):
        if other.shape[:2] != image.shape[:2]:
            sizes = [f"{a.shape[1]} x {a.shape[0]}" for a in (image, other)]
            raise UserError(
                f"{path} is of {sizes[0]} pixels, its {'second frame' if arguments.second else 'mask'} of {sizes[1]}."
            )
    names = _unique_names(arguments.images)
    predictor = Predictor(
        arguments.weights, config=sampling_config(arguments), vae=arguments.vae, device=arguments.device, read=load_weights
    )
    task = arguments.task or predictor.task
    embeddings = None
    if arguments.clip:
        if task != "amodal" or not predictor.model.clip_embedding_size:
            raise UserError(f"--clip is for amodal weights with CLIP embeddings; {arguments.weights} takes none: leave it out.")
        clip = load_clip(arguments.clip)
        clip.model.to(predictor.device)
        embeddings = clip([visible_object(image, mask) for image, mask in zip(images, others, strict=True)])
    predictions = predictor(
        images, task=task, others=others or None, embeddings=embeddings, keys=names, resolution=arguments.resolution
    )
    for name, image, prediction in zip(names, images, predictions, strict=True):
        for path in write_outputs(prediction, task, image, arguments.out, name):
            print(path)


def _unique_names(paths: list[Path]) -> list[str]:
    """The files' names without suffix, numbered where two are the same."""
    stems = [p.stem for p in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}_{stems[:i].count(stem)}" for i, stem in enumerate(stems)]
