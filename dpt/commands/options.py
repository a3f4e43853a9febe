"""Options shared by several commands."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpt.config.numbers import COUNT, SAMPLER_STEPS, SHARE, WHOLE, numeric
from dpt.config.recipe import COMMAND_LINE, section_from_dict
from dpt.config.sections import EvaluationConfig, ModelConfig, TrackingConfig
from dpt.errors import UserError
from dpt.tracking.read import RunRecord, load_runs, with_ancestors

if TYPE_CHECKING:
    from dpt.publishing.card import Form


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add options that select runs: named ones, or those of an experiment, filtered."""
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run ids (ours or MLflow's, or prefixes of them) or names")
    add("--experiment", help="all runs of this experiment")
    add("--filter", default="", help="MLflow search condition, e.g. \"params.task = 'depth'\"")
    add("--uri", default=TrackingConfig.uri, help="MLflow store")


def selected_runs(arguments: argparse.Namespace) -> tuple[list[RunRecord], list[RunRecord]]:
    """Return (the chosen runs, those and all their ancestors); UserError if none is chosen."""
    if not arguments.runs and not arguments.experiment:
        raise UserError("no run is chosen; name runs, or an experiment with --experiment.")
    records = load_runs(arguments.uri, arguments.experiment, arguments.runs or None, arguments.filter)
    if not records:
        raise UserError(f"no run of {arguments.uri} fits; check --experiment and --filter.")
    return records, with_ancestors(records, arguments.uri)


def add_sampling_options(
    parser: argparse.ArgumentParser, *, steps: int, guidance: float, sampler: str = "ddim", on_ranks: bool = False
) -> None:
    """Add options for weights and sampling. on_ranks: for a command with its own `weights` whose ranks have a device each."""
    add = parser.add_argument
    if not on_ranks:
        add("--weights", required=True, help="exported, a checkpoint, public, or hub:owner/name[@revision]")
        add("--device", help="e.g. cuda:0 or cpu (default: the accelerator, if there is one)")
    add("--vae", default="", help="VAE (a folder, or a name on the hub), if the weights name none")
    add("--steps", type=numeric(int, SAMPLER_STEPS), default=steps, help="sampler steps")
    add("--sampler", default=sampler, choices=("ddim", "ddpm", "dpmsolver++"), help="sampling method")
    schedules = ("linear", "scaled_linear", "squaredcos_cap_v2")
    schedule = "noise schedule at test time, with its usual betas (default: that of training)"
    add("--schedule", default="", choices=schedules, help=schedule)
    spacing = "spacing of the sampler's timesteps (default: as the weights say)"
    add("--timestep-spacing", default="", choices=("leading", "trailing", "linspace"), help=spacing)
    add("--guidance", type=numeric(float), default=guidance, help="guidance scale; 1: none")
    share, levels = numeric(float, SHARE), "noise levels, as shares of the timesteps, at which guidance acts"
    add("--guidance-interval", type=share, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help=levels)
    add("--seed", type=WHOLE, default=0, help="seed of the initial noise")
    add("--batch-size", "--batch", type=COUNT, default=16, help="predictions computed at once")
    number = "number format of the network's products; tf32 is for GPUs"
    add("--precision", default="fp32", choices=("fp32", "tf32", "bf16"), help=number)


def add_card_options(parser: argparse.ArgumentParser) -> None:
    """Add options for what a model card says beyond what the weights know."""
    add = parser.add_argument_group("model card (README.md)").add_argument
    add("--license", default="", help="e.g. apache-2.0, as the hub names licences (default: unknown)")
    add("--name", default="", metavar="OWNER/NAME", help="the name in its example (default: the folder's name)")
    add("--uri", default="", help="MLflow store with data, lineage and results (default: what the weights say)")
    add("--run", default="", help="the run there that trained the weights (default: the one they name)")


def card_text(
    arguments: argparse.Namespace, model: ModelConfig, sections: Mapping[str, Any], *, form: "Form", name: str
) -> str:
    """Text of the weights' model card, with the options of `add_card_options`."""
    from dpt.publishing.card import model_card, read_history

    history = None
    if arguments.uri or arguments.run:
        run = arguments.run or (sections.get("lineage") or {}).get("run_id", "")
        if not run:
            raise UserError("the weights name no run of MLflow; name the one that trained them with --run, or leave --uri out.")
        history = read_history(arguments.uri or TrackingConfig.uri, run)
    return model_card(model, sections, form=form, name=name, license=arguments.license, history=history)


def write_card(
    arguments: argparse.Namespace, model: ModelConfig, sections: Mapping[str, Any], *, form: "Form", name: str, folder: Path
) -> None:
    """Write `card_text` as a folder's README.md."""
    text = card_text(arguments, model, sections, form=form, name=name)
    (folder / "README.md").write_text(text, encoding="utf-8")


def sampling_config(arguments: argparse.Namespace, **more: Any) -> EvaluationConfig:
    """Turn the options of `add_sampling_options` (and --ensemble), plus `more` fields, into the predictor's section."""
    low, high = arguments.guidance_interval
    same = ("sampler", "schedule", "timestep_spacing", "seed", "batch_size", "precision")
    values = more | {name: getattr(arguments, name) for name in same}
    values |= {"steps": [arguments.steps], "ensemble": [getattr(arguments, "ensemble", 1)]}
    values |= {"guidance_scale": arguments.guidance, "guidance_low": low, "guidance_high": high}
    return section_from_dict(EvaluationConfig, values, COMMAND_LINE)
