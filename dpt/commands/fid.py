"""Score class-conditional weights by the images they generate: FID, sFID, Inception Score, precision, recall, FD-DINOv2.

Repeat the command to continue an interrupted run. On several GPUs: deepspeed --module dpt.cli fid ..., or
torchrun -m dpt.cli fid ...
"""

import argparse
import dataclasses
import os

from dpt.commands.options import add_sampling_options, sampling_config
from dpt.config.generation import GenerationConfig
from dpt.config.numbers import COUNT, NATURAL
from dpt.config.recipe import COMMAND_LINE, DptConfig, Recipe, section_from_dict
from dpt.config.sections import TrackingConfig
from dpt.errors import UserError

_STEPS, _GUIDANCE = 250, 1.0


def configure(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, GenerationConfig()
    add("weights", nargs="?", default="", help="weights: exported, a checkpoint, public, or hub:owner/name")
    add("--images", default="", help="score these images instead of generating some: a folder or an .npz")
    real = "real images: class shards, pictures, or an .npz of images or statistics (ADM's too)"
    add("--reference", required=True, metavar="SHARDS|FOLDER|NPZ", help=real)
    add("--num-images", type=COUNT, default=default.num_images, help="images generated")
    labels = "balanced classes, or the frequencies of the reference shards"
    add("--labels", default=default.labels, choices=("balanced", "shares"), help=labels)
    add("--guidance-channels", type=NATURAL, default=0, help="guided latent channels; 0: all, public DiT: 3")
    add("--no-ema", action="store_true", help="the plain weights, not the averaged ones")
    network = "TorchScript of the feature network (default: Inception-v3 in torch.hub's cache)"
    add("--features", default="", metavar="FILE", help=network)
    add("--features-sha256", default="", metavar="HASH", help="of a file that is not StyleGAN's Inception-v3")
    add("--dinov2", default="", metavar="FOLDER|NAME", help="for FD-DINOv2: a folder or a hub name, e.g. facebook/dinov2-large")
    add("--dinov2-sha256", default="", metavar="HASH", help="of weights other than facebook/dinov2-large's")
    add("--neighbours", type=COUNT, default=default.neighbours, help="k of the k-th neighbours in precision and recall")
    add("--manifold-images", type=COUNT, default=default.manifold_images, help="real images for precision and recall")
    add("--save-reference", default="", metavar="NPZ", help="keep the reference's statistics for later")
    add("--cache-dir", default="", metavar="FOLDER", help="keeps reference shards fetched from URLs")
    add("--out", default="runs/fid", help="folder of images and results")
    add("--uri", default=TrackingConfig.uri, help="MLflow store")
    add("--experiment", default=TrackingConfig.experiment, help="MLflow experiment")
    add("--no-tracking", action="store_true", help="record nothing in MLflow")
    add_sampling_options(parser, steps=_STEPS, guidance=_GUIDANCE, sampler="ddpm", on_ranks=True)


def run(arguments: argparse.Namespace) -> None:
    from dpt import distributed

    if bool(arguments.weights) == bool(arguments.images):
        raise UserError("give weights to score, or ready-made pictures with --images.")
    recipe = _recipe(arguments)
    distributed.set_environment()
    if int(os.environ["WORLD_SIZE"]) > 1:
        distributed.init()
    from dpt.evaluation.generation_runner import format_metrics, run_generation
    from dpt.training.export import load_weights

    summary = run_generation(recipe, vae=arguments.vae, read=load_weights)
    distributed.log(format_metrics(summary))
    distributed.log(f"{arguments.out}/fid.json")
    distributed.shutdown()


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """The command line as a recipe, the form that MLflow keeps."""
    sections = {
        "data": {"cache_dir": arguments.cache_dir},
        "generation": {field.name: getattr(arguments, field.name) for field in dataclasses.fields(GenerationConfig)},
        "tracking": {"uri": arguments.uri, "experiment": arguments.experiment, "enabled": not arguments.no_tracking},
    }
    dpt = section_from_dict(DptConfig, sections, COMMAND_LINE, prefix="dpt")
    evaluation = sampling_config(arguments, weights=arguments.weights, use_ema=not arguments.no_ema, output_dir=arguments.out)
    return Recipe(deepspeed={}, dpt=dataclasses.replace(dpt, evaluation=evaluation))
