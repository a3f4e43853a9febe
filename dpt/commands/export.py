"""Write the weights of a checkpoint as the folder that evaluation, the next stage and other tools load."""

import argparse
from pathlib import Path

from dpt.errors import UserError
from dpt.models.pretrained import export_weights
from dpt.training.export import export, load_weights


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="a step_... folder, or a run's folder: its newest; with --diffusers, any weights"
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--ema-decay", type=float, help="decay of the average, of a run that kept several (default: its first)")
    parser.add_argument("--diffusers", action="store_true", help="write a diffusers DiTTransformer2DModel (dense networks)")
    parser.add_argument("--plain", action="store_true", help="with --diffusers: the plain weights, not their average")


def run(arguments: argparse.Namespace) -> None:
    if arguments.diffusers:
        if arguments.ema_decay is not None:
            raise UserError(
                "--ema-decay does not go with --diffusers; export a folder first, then that folder with --diffusers."
            )
        print(export_weights(load_weights(arguments.checkpoint, ema=not arguments.plain), arguments.out, format="diffusers"))
    else:
        print(export(arguments.checkpoint, arguments.out, ema_decay=arguments.ema_decay))
