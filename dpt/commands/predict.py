"""Predict depth, optical flow or whole-object masks for pictures, folders and videos with trained weights.

Repeat the command to continue after an interruption. On several GPUs: deepspeed --module dpt.cli predict ..., or
torchrun -m dpt.cli predict ...
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpt.commands.options import add_sampling_options, sampling_config
from dpt.config.numbers import ENSEMBLE_SIZES, NOT_NEGATIVE, POSITIVE, Range, numeric
from dpt.errors import UserError

if TYPE_CHECKING:
    from dpt.evaluation.frames import Source
    from dpt.evaluation.predicting import Embed
    from dpt.evaluation.prediction import Predictor


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="pictures of any size, folders of them, videos")
    add("--task", help="depth, flow, amodal or a registered task (default: the weights' task)")
    same = "or a folder with the same names"
    add("--second", nargs="+", type=Path, default=[], help=f"flow: second frame of each picture, {same}")
    add("--mask", nargs="+", type=Path, default=[], help=f"amodal: visible mask of each picture's object, {same}")
    add("--clip", default="", metavar="FOLDER", help="amodal: CLIP image tower, if the weights need one")
    pattern = 'which files of folders, e.g. "*.png" (repeatable; default: all pictures and videos)'
    add("--pattern", action="append", default=[], help=pattern)
    add("--no-recursive", action="store_true", help="ignore subfolders")
    add("--frames", action="store_true", help="the pictures of a folder, by name, are the frames of one video")
    add("--out", type=Path, default=Path("predictions"), help="folder of the results")
    by_task = "depth: npy, png16, colour, exr, ply; flow: flo, colour; amodal: mask, overlay, whole"
    add("--formats", default="", help=f"separated by commas; {by_task} (default: npy,png16,colour; flow and amodal: all)")
    angle = numeric(float, Range(above=0, below=180))
    add("--fov", type=angle, default=60.0, help="ply: the camera's horizontal field of view in degrees")
    add("--focal", type=numeric(float, NOT_NEGATIVE), default=0.0, help="ply: focal length in pixels, instead of --fov")
    distances = "ply: distances of the nearest and farthest point, as depth is only known up to scale and shift"
    above_0 = numeric(float, POSITIVE)
    add("--depth-range", type=above_0, nargs=2, default=(1.0, 5.0), metavar=("NEAR", "FAR"), help=distances)
    add("--again", action="store_true", help="redo files that are done")
    side = "longest side of the network's input, in pixels (default: as trained)"
    add("--resolution", type=numeric(int, Range(least=0, most=8192)), default=0, help=side)
    fit = "stretch pictures to the square, or keep their aspect (default: as trained)"
    add("--fit", choices=("stretch", "aspect"), default="", help=fit)
    add("--ensemble", type=numeric(int, ENSEMBLE_SIZES), default=1, help="predictions that are merged")
    add_sampling_options(parser, steps=50, guidance=1.0)


def run(arguments: argparse.Namespace) -> None:
    from dpt import distributed, hub
    from dpt.evaluation.frames import find_sources
    from dpt.evaluation.outputs import OutputConfig, formats_from_text

    if arguments.second and arguments.mask:
        raise UserError("--second is for flow and --mask for amodal; give one of them.")
    (near, far), formats = arguments.depth_range, formats_from_text(arguments.formats)
    outputs = OutputConfig(formats=formats, fov=arguments.fov, focal=arguments.focal, near=near, far=far)
    sources = find_sources(
        arguments.inputs,
        patterns=arguments.pattern,
        recursive=not arguments.no_recursive,
        as_frames=arguments.frames,
        out=arguments.out,
    )
    sources = _with_others(sources, arguments)
    distributed.set_environment()
    if int(os.environ["WORLD_SIZE"]) > 1:
        distributed.init()
    from dpt.evaluation.predicting import predict_files
    from dpt.evaluation.prediction import Predictor
    from dpt.evaluation.runner import weights_sha256
    from dpt.progress import say
    from dpt.training.export import load_weights

    config, weights = sampling_config(arguments), hub.pinned(arguments.weights)
    with distributed.shared_errors():
        predictor = Predictor(weights, config=config, vae=arguments.vae, device=arguments.device, read=load_weights)
    if arguments.fit:
        predictor.fits = {task: dataclasses.replace(fit, how=arguments.fit) for task, fit in predictor.fits.items()}
    task = arguments.task or predictor.task
    for option, wanted in (("second", "flow"), ("mask", "amodal")):
        if getattr(arguments, option) and task != wanted:
            raise UserError(f"--{option} is for {wanted}, and {arguments.weights} predicts {task}; leave it out.")
        if task == wanted and any(source.other is None and not source.is_video for source in sources):
            raise UserError(f"{arguments.weights} predicts {task}: each picture needs its {_OTHERS[option]}; give --{option}.")
    settings = {name: value for name, value in vars(arguments).items() if name not in _NOT_SETTINGS}
    with distributed.shared_errors():
        done = predict_files(
            predictor,
            sources,
            arguments.out,
            task=task,
            outputs=outputs,
            resolution=arguments.resolution,
            embed=_embedding(arguments, predictor, task),
            settings={"task": task, "weights": weights_sha256(predictor), **settings},
            again=arguments.again,
            report=say,
        )
    failed = [text for part in distributed.gather_objects(done.failed) for text in part]
    skipped = sum(distributed.gather_objects(done.skipped))
    if skipped:
        distributed.log(f"{skipped} of {len(sources)} were already there, with the same settings (--again repeats them).")
    if len(failed) > 1 and distributed.is_main():
        print("\n".join(failed), file=sys.stderr)
    distributed.shutdown()
    if len(failed) > 1:
        raise UserError(f"{len(failed)} of {len(sources)} could not be predicted, each named above; the others are written.")
    if failed:
        rest = f"; 1 of {len(sources)} could not be predicted, the others are written." if len(sources) > 1 else "."
        raise UserError(failed[0].rstrip(".") + rest)


_OTHERS = {"second": "second frame", "mask": "visible mask"}
_FILES = ("inputs", "second", "mask", "pattern", "no_recursive", "frames", "out", "weights")
_NOT_SETTINGS = (*_FILES, "again", "batch_size", "device")
"""Options that a picture's results do not depend on (the files belonging to it are recorded separately)."""


def _with_others(sources: "list[Source]", arguments: argparse.Namespace) -> "list[Source]":
    """Pair each source with its second frame or mask."""
    given, option = (arguments.second, "--second") if arguments.second else (arguments.mask, "--mask")
    if not given:
        if arguments.clip:
            raise UserError(
                f"--clip embeds visible objects: give a --mask for each picture ({len(sources)} pictures, 0 masks)."
            )
        return sources
    if any(source.is_video for source in sources):
        raise UserError(f"{option} is for pictures; a video's frames follow each other.")
    if len(given) == 1 and given[0].is_dir():
        given = [_namesake(given[0], source, option) for source in sources]
    if len(given) != len(sources):
        what = _OTHERS[option.removeprefix("--")]
        raise UserError(f"{option}: each picture needs one {what}; {len(given)} were given for {len(sources)}.")
    return [dataclasses.replace(source, other=other) for source, other in zip(sources, given, strict=True)]


def _namesake(folder: Path, source: "Source", option: str) -> Path:
    """The file in `folder` with the source's name, whatever its suffix."""
    from dpt.evaluation.frames import PICTURES

    for suffix in (source.path.suffix, *PICTURES):
        if (path := folder / f"{source.name}{suffix}").is_file():
            return path
    raise UserError(f"{option} {folder}: nothing there is named {source.name}; name the files as the pictures are.")


def _embedding(arguments: argparse.Namespace, predictor: "Predictor", task: str) -> "Embed | None":
    """Function that embeds visible objects, if the command names an image tower."""
    from dpt.clip import load_clip
    from dpt.tasks import visible_object

    if not arguments.clip:
        return None
    if task != "amodal" or not predictor.model.clip_embedding_size:
        raise UserError(f"--clip is for amodal weights with CLIP embeddings; {arguments.weights} takes none: leave it out.")
    clip = load_clip(arguments.clip)
    clip.model.to(predictor.device)

    def embed(image: Any, mask: Any) -> Any:
        return clip([visible_object(image, mask)])[0]

    return embed
