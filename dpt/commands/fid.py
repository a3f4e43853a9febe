"""Score class-conditional weights by the images they generate: FID, sFID, Inception Score, precision, recall, FD-DINOv2.

An interrupted run goes on where it stopped. On several GPUs: deepspeed --module dpt.cli fid ..., or torchrun -m dpt.cli fid ...
"""

import argparse
import dataclasses
import os

from dpt.commands.options import add_sampling_options, sampling_config
from dpt.config.generation import GenerationConfig
from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, numeric
from dpt.config.recipe import DptConfig, Recipe, section_from_dict
from dpt.config.sections import DataConfig, TrackingConfig
from dpt.errors import UserError

_STEPS, _GUIDANCE = 250, 1.0


def configure(parser: argparse.ArgumentParser) -> None:
    default = GenerationConfig()
    parser.add_argument("weights", nargs="?", default="", help="weights: exported, a checkpoint, public, or hub:owner/name")
    parser.add_argument("--images", default="", help="ready-made images to score instead of weights: a folder or an .npz")
    parser.add_argument("--reference", required=True, metavar="SHARDS|FOLDER|NPZ",
                        help="real images: class shards, pictures, or an .npz of images or statistics (ADM's too)")  # fmt: skip
    parser.add_argument(
        "--num-images",
        type=numeric(int, AT_LEAST_1),
        default=default.num_images,
        help="images generated (default: %(default)s)",
    )
    parser.add_argument("--labels", default=default.labels, choices=("balanced", "shares"),
                        help="classes equally often, or as the reference shards have them (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--guidance-channels", type=numeric(int, NOT_NEGATIVE), default=0, help="latent channels guided; 0: all, public DiT: 3"
    )
    parser.add_argument("--no-ema", action="store_true", help="the plain weights, not the averaged ones")
    parser.add_argument("--features", default="", metavar="FILE",
                        help="TorchScript of the feature network (default: Inception-v3 in torch.hub's cache)")  # fmt: skip
    parser.add_argument("--features-sha256", default="", metavar="HASH", help="of a file that is not StyleGAN's Inception-v3")
    parser.add_argument("--dinov2", default="", metavar="FOLDER|NAME",
                        help="for FD-DINOv2: a folder or a hub name, e.g. facebook/dinov2-large")  # fmt: skip
    parser.add_argument("--dinov2-sha256", default="", metavar="HASH", help="of weights other than facebook/dinov2-large's")
    parser.add_argument("--neighbours", type=numeric(int, AT_LEAST_1), default=default.neighbours,
                        help="neighbour that precision and recall reach to (default: %(default)s)")  # fmt: skip
    parser.add_argument("--manifold-images", type=numeric(int, AT_LEAST_1), default=default.manifold_images,
                        help="real images that precision and recall look at (default: %(default)s)")  # fmt: skip
    parser.add_argument("--save-reference", default="", metavar="NPZ", help="keep the reference's statistics for later")
    parser.add_argument("--cache-dir", default="", metavar="FOLDER", help="keeps reference shards fetched from URLs")
    parser.add_argument("--out", default="runs/fid", help="folder of images and results (default: %(default)s)")
    parser.add_argument("--uri", default=TrackingConfig.uri, help="MLflow store (default: %(default)s)")
    parser.add_argument("--experiment", default=TrackingConfig.experiment, help="MLflow experiment (default: %(default)s)")
    parser.add_argument("--no-tracking", action="store_true", help="record nothing in MLflow")
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
    """The command line as a recipe, which is what MLflow keeps."""
    source = "the command line"
    generation = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(GenerationConfig)}
    tracking = {"uri": arguments.uri, "experiment": arguments.experiment, "enabled": not arguments.no_tracking}
    return Recipe(
        deepspeed={},
        dpt=DptConfig(
            data=section_from_dict(DataConfig, {"cache_dir": arguments.cache_dir}, source, prefix="dpt.data"),
            evaluation=sampling_config(
                arguments, weights=arguments.weights, use_ema=not arguments.no_ema, output_dir=arguments.out
            ),
            generation=section_from_dict(GenerationConfig, generation, source, prefix="dpt.generation"),
            tracking=section_from_dict(TrackingConfig, tracking, source, prefix="dpt.tracking"),
        ),
    )
