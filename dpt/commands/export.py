"""Write the weights of a checkpoint as the folder that evaluation, the next stage and other tools load."""

import argparse
from pathlib import Path

from dpt.config.numbers import SHARE, Range, numeric
from dpt.config.sections import LONGEST_EMA
from dpt.errors import UserError
from dpt.models.pretrained import export_weights, read_config
from dpt.training.export import export, load_weights


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="a step_... folder, or a run's folder: its newest; with --diffusers, any weights"
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--ema-decay", type=numeric(float, SHARE), help="decay of the average, of a run that kept several (default: its first)"
    )
    parser.add_argument(
        "--ema-length",
        type=numeric(float, Range(above=0, most=LONGEST_EMA)),
        metavar="SHARE",
        help="instead an average of this length, as a share of the run (EDM2's sigma_rel), made of a run's snapshots "
        "(dpt.training.ema_lengths)",
    )
    parser.add_argument("--diffusers", action="store_true", help="write a diffusers DiTTransformer2DModel (dense networks)")
    parser.add_argument("--plain", action="store_true", help="with --diffusers: the plain weights, not their average")


def run(arguments: argparse.Namespace) -> None:
    given = [name for name in ("ema_decay", "ema_length") if getattr(arguments, name) is not None]
    if len(given) == 2:
        raise UserError("--ema-decay and --ema-length are two averages; give one of them.")
    if arguments.diffusers:
        if given:
            raise UserError(
                f"--{given[0].replace('_', '-')} does not go with --diffusers; export a folder first, then that folder with "
                "--diffusers."
            )
        print(export_weights(load_weights(arguments.checkpoint, ema=not arguments.plain), arguments.out, format="diffusers"))
    else:
        out = export(arguments.checkpoint, arguments.out, ema_decay=arguments.ema_decay, ema_length=arguments.ema_length)
        print(out)
        if arguments.ema_length is not None:
            residual = read_config(out)["lineage"]["ema_residual"]
            print(f"  averaged with the relative length {arguments.ema_length}, whose profile is met to {residual:.2%}")
