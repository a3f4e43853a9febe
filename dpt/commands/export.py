"""Export weights: as a folder for evaluation and the next stage, or as a pipeline that diffusers loads without dpt."""

import argparse
import json
from pathlib import Path

from dpt.commands.options import add_card_options, card_text, write_card
from dpt.config.numbers import ENSEMBLE_SIZES, SAMPLER_STEPS, SHARE, Range, numeric
from dpt.config.sections import LONGEST_EMA
from dpt.errors import UserError
from dpt.models.exporting import export_weights
from dpt.models.pretrained import read_config
from dpt.training.export import export, load_weights


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "a step_... folder, or a run's folder (its newest checkpoint); with --to diffusers any weights, hub:owner/name too"
    add("checkpoint", type=Path, help=what)
    add("out", type=Path, help="folder to write")
    form = "diffusers: a pipeline, for class images (dense; DiTPipeline) or depth (dense or with experts; needs no dpt)"
    add("--to", choices=("dpt", "diffusers"), default="dpt", help=form)
    add("--ema-decay", type=numeric(float, SHARE), help="decay of the average to export (default: the run's first)")
    lengths, from_snapshots = numeric(float, Range(above=0, most=LONGEST_EMA)), "from the snapshots of dpt.training.ema_lengths"
    length = f"instead, an average of this length as a share of the run (EDM2's sigma_rel), {from_snapshots}"
    add("--ema-length", type=lengths, metavar="SHARE", help=length)
    add("--diffusers", action="store_true", help="write a DiTTransformer2DModel alone (dense networks)")
    add("--plain", action="store_true", help="for diffusers: the plain weights, not their average")
    add = parser.add_argument_group("pipelines (--to diffusers)").add_argument
    add("--vae", default="", help="VAE (a folder, or a name on the hub), if the weights name none")
    add("--include-vae", action="store_true", help="depth: copy the VAE even if it is on the hub")
    names = "one name per line, or a JSON list (default: those of the training shards)"
    add("--class-names", type=Path, metavar="FILE", help=names)
    add("--steps", type=numeric(int, SAMPLER_STEPS), default=50, help="depth: the pipeline's sampler steps")
    add("--ensemble", type=numeric(int, ENSEMBLE_SIZES), default=1, help="depth: the pipeline's ensemble size")
    add_card_options(parser)


def run(arguments: argparse.Namespace) -> None:
    given = [name for name in ("ema_decay", "ema_length") if getattr(arguments, name) is not None]
    if len(given) == 2:
        raise UserError("--ema-decay and --ema-length are two averages; give one of them.")
    to_diffusers = arguments.diffusers or arguments.to == "diffusers"
    if to_diffusers and given:
        way = "--diffusers" if arguments.diffusers else "--to diffusers"
        raise UserError(
            f"--{given[0].replace('_', '-')} does not go with {way}; export a folder first, then that folder with it."
        )
    if arguments.diffusers:
        print(export_weights(load_weights(arguments.checkpoint, ema=not arguments.plain), arguments.out, format="diffusers"))
    elif to_diffusers:
        _write_pipeline(arguments)
    else:
        out = export(arguments.checkpoint, arguments.out, ema_decay=arguments.ema_decay, ema_length=arguments.ema_length)
        config = read_config(out)
        write_card(arguments, config.pop("model"), config, form="dpt", name=arguments.name or out.name, folder=out)
        print(out)
        if arguments.ema_length is not None:
            residual = config["lineage"]["ema_residual"]
            print(f"  averaged with the relative length {arguments.ema_length}; its profile is matched to {residual:.2%}")


def _write_pipeline(arguments: argparse.Namespace) -> None:
    from dpt.publishing.card import usage
    from dpt.publishing.pipelines import write_pipeline

    weights = load_weights(arguments.checkpoint, ema=not arguments.plain)
    name = arguments.name or arguments.out.name
    out = write_pipeline(
        weights,
        arguments.out,
        source=str(arguments.checkpoint),
        class_names=_class_names(arguments.class_names) if arguments.class_names else (),
        card=card_text(arguments, weights.config, weights.sections, form="diffusers", name=name),
        **{option: getattr(arguments, option) for option in ("vae", "include_vae", "steps", "ensemble")},
    )
    print(out)
    task = weights.sections.get("task", "class")
    for line in usage("diffusers", task, str(out), timestep_features=weights.config.timestep_features).splitlines():
        print(f"  {line}")


def _class_names(file: Path) -> list[str]:
    """Read the names in a file: a JSON list, or one per line."""
    try:
        text = file.read_text(encoding="utf-8")
        names = json.loads(text) if file.suffix == ".json" else [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--class-names {file}: cannot be read ({error}); give one line per class, or a JSON list.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"--class-names {file}: holds no list of texts; give one line per class, or a JSON list.")
    return names
