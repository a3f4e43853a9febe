"""Run studies (grids of launches, from YAML files) and draw their figures. Repeat the command to do only what is missing."""

import argparse
import shlex
from pathlib import Path

from dpt.config.numbers import COUNT, POSITIVE, Range, numeric
from dpt.config.sections import TrackingConfig
from dpt.errors import UserError, hide_passwords
from dpt.scaling.figures import draw, find
from dpt.scaling.launching import command, count_devices, missing, pending, submit
from dpt.scaling.rehearsal import WATERMARK, make_shards, rehearsal_of
from dpt.scaling.results import format_cells, format_table, results_table, show_macs
from dpt.scaling.running import run_here
from dpt.scaling.shard_sets import how_to_make, images_of
from dpt.scaling.study import Study, expected_macs, read_study
from dpt.tracking.read import RunRecord, load_runs, with_ancestors
from dpt.tracking.sender import sync


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=Path, nargs="+", help="YAML file, e.g. studies/small_model_size.yaml; several run as one")
    add("--jobs", type=COUNT, default=1, help="launches at a time, sharing the devices or CPU threads")
    add("--uri", default=TrackingConfig.uri, help="MLflow store of the runs")
    add("--dry-run", action="store_true", help="show launches, expected MACs and commands; start nothing")
    peak = "with --dry-run: a device's FLOP/s (default: H100, bf16 dense)"
    add("--peak-flops", type=numeric(float, POSITIVE), default=989e12, help=peak)
    add("--mfu", type=numeric(float, Range(above=0, most=1)), default=0.4, help="with --dry-run: share of that peak reached")
    toy = "run all launches at toy size, on tiny native sets or your own, inside FOLDER (%(const)s); results are marked"
    folder = Path("runs/rehearsal")
    add("--rehearse", nargs="?", type=Path, const=folder, metavar="FOLDER", help=toy)
    add("--figures", action="store_true", help="only draw the figures of finished launches")
    sbatch = 'submit to SLURM with these options of sbatch, e.g. "-N 1 --gpus 8"; --uri must be a tracking server'
    add("--slurm", metavar="OPTIONS", help=sbatch)
    add("--slurm-script", default="launchers/slurm.sh", help="batch script")


def run(arguments: argparse.Namespace) -> None:
    if arguments.rehearse is not None:
        _rehearse(arguments)
        return
    studies = [read_study(path, uri=arguments.uri) for path in arguments.study]
    if arguments.dry_run:
        for study in studies:
            _show(study, arguments.peak_flops, arguments.mfu)
        return
    if arguments.slurm is not None:
        submit(studies, shlex.split(arguments.slurm), script=arguments.slurm_script, say=_say)
        print("When the jobs are done, `dpt study --figures` draws the figures.")
        return
    if not arguments.figures:
        run_here(studies, jobs=arguments.jobs, fork=True, say=_say)
    if problems := [problem for study in studies for problem in _draw(study, arguments.uri)]:
        raise UserError(" ".join(problems))


def _rehearse(arguments: argparse.Namespace) -> None:
    """Run small versions of the studies, in their own folder and store, up to figures and tables."""
    for option in ("dry_run", "figures", "slurm"):
        if getattr(arguments, option):
            raise UserError(f"--rehearse runs everything, here; leave --{option.replace('_', '-')} out.")
    folder = arguments.rehearse
    uri = f"sqlite:///{folder}/mlflow.db"
    devices = count_devices() // max(1, arguments.jobs)
    studies = [rehearsal_of(read_study(path, uri=uri), folder, devices=devices) for path in arguments.study]
    make_shards(studies, folder, say=_say)
    run_here(studies, jobs=arguments.jobs, fork=True, say=_say)
    sync(folder)
    problems = [problem for study in studies for problem in _draw(study, uri, watermark=WATERMARK)]
    for study in studies:
        names = {launch.name for launch in study.launches}
        rows = results_table(run for run in load_runs(uri, study.experiment) if run.name in names)
        _say(f"\n{WATERMARK} of {study.path}: toy networks, the scores mean nothing\n{format_table(rows)}")
    if problems:
        raise UserError(" ".join(problems))


def _say(text: str) -> None:
    print(text, flush=True)


def _show(study: Study, peak_flops: float, mfu: float) -> None:
    """Print every launch with its cost, and the commands left to run."""
    unfinished = {launch.name for launch in pending(study)}
    cells, training, scoring = [], 0.0, 0.0
    for launch in study.launches:
        macs, state = expected_macs(study, launch), "to do" if launch.name in unfinished else "done"
        whole = macs if launch.launcher != "evaluate" else macs * sum(map(images_of, launch.resolved.dpt.evaluation.data))
        if launch.name in unfinished and launch.launcher == "evaluate":
            scoring += whole
        elif launch.name in unfinished:
            training += whole
        hours = f"{device_hours(whole, peak_flops, mfu):,.1f}" if whole else "–"
        cells.append([launch.name, launch.launcher, show_macs(macs), hours, state])
    print(
        f"{study.title}: {len(unfinished)} of {len(study.launches)} launches to do, {show_macs(training)}MACs of training, "
        f"{device_hours(training, peak_flops, mfu):,.1f} device-hours at {mfu:.0%} of {peak_flops / 1e12:g} TFLOP/s; "
        f"evaluation {device_hours(scoring, peak_flops, mfu):,.1f} device-hours (sets of published size, network alone)\n"
    )
    if absent := missing(study):
        print("To be made first:\n" + "\n".join(map(how_to_make, absent)) + "\n")
    print(format_cells(["launch", "launcher", "MACs (evaluation: per image)", "device-hours", "state"], cells))
    commands = [shlex.join(command(launch)) for launch in study.launches if launch.name in unfinished]
    print("\n" + hide_passwords("\n".join(commands)))


def device_hours(macs: float, peak_flops: float, mfu: float) -> float:
    """Hours on a device with this peak (FLOP/s) at this utilisation."""
    return 2 * macs / (peak_flops * mfu) / 3600


def _draw(study: Study, uri: str, *, watermark: str = "") -> list[str]:
    """Draw every figure from the newest run of each launch; return a sentence for each that cannot be drawn."""
    newest: dict[str, RunRecord] = {r.name: r for r in load_runs(uri, study.experiment)}
    family = with_ancestors(list(newest.values()), uri)
    problems = []
    for figure in study.figures:
        records = [newest[launch.name] for launch in study.of_stages(figure.stages) if launch.name in newest]
        try:
            findings = find(records, family, figure)
        except UserError as error:
            problems.append(f"{study.path}: figure {figure.name}: {error}")
            continue
        path = draw(findings, study.output / "figures" / f"{study.path.stem}_{figure.name}.svg", watermark=watermark)
        _say(f"{path}: {figure.title or figure.name}")
        for sentence in findings.sentences() + findings.refusals:
            _say(f"  {sentence}")
    return problems
