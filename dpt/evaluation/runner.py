"""The evaluator: predict and score each sample of each set once, on any number of ranks, under all settings of a sweep."""

import contextlib
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpt import distributed
from dpt.config.recipe import Recipe
from dpt.config.sections import EvaluationConfig
from dpt.errors import UserError
from dpt.evaluation.files import write_json
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.recording import Recording, open_predictor, shards_as_dataset
from dpt.evaluation.records import Record, RecordLog, write_parquet
from dpt.evaluation.scoring import Scorer
from dpt.evaluation.sets import EvaluationSet, check_set, open_sets
from dpt.evaluation.summary import SAME, pick_samples, protocol_line, summarize, tracked_metrics
from dpt.fits import as_section
from dpt.locking import held
from dpt.models.costs import macs
from dpt.models.pretrained import read_weights
from dpt.models.weights import Weights
from dpt.progress import progress
from dpt.scores import name_of, say

SUMMARY_VERSION = 1
SCENES = "scenes"
"""Folder of report scenes, below the set's own (`dpt.evaluation.pictures.write_scenes`)."""
_SAMPLING = ("sampler", "eta", "step_power", "guidance_scale", "guidance_low", "guidance_high", "precision", "seed")


def evaluate(
    config: EvaluationConfig,
    *,
    predictor: Predictor | None = None,
    cache_dir: str = "",
    begin: Callable[[list[EvaluationSet]], object] = len,
) -> dict[str, Any]:
    """Score `config.data` with `predictor` (default: from `config.weights`), or the ready-made `config.predictions`.

    `cache_dir`: folder that keeps shards fetched from URLs. `begin` is called with the sets once all input has passed
    its checks, before anything is scored.

    Writes, below `config.output_dir`: summary.json; and for each set SET/samples.parquet, SET/pictures/*.png and, until
    finished, SET/parts, from which an interrupted run resumes. Returns the summary, on every rank. UserError for bad input.
    """
    if not config.predictions and predictor is None and not config.weights:
        raise UserError("dpt.evaluation.weights is empty; name the weights to evaluate, or ready-made predictions.")
    with distributed.shared_errors():
        sets = open_sets(config.data, protocol=config.protocol, max_samples=config.max_samples, cache_dir=cache_dir)
        if config.predictions:
            predictor = None
        elif predictor is None:
            predictor = Predictor(config.weights, config=config)
        if predictor is not None:
            if (settled := config.settled(predictor.diffusion)) != config:
                distributed.log("These weights predict in one pass: dpt.evaluation.steps and ensemble are 1.")
                config = settled
            for one in sets:
                check_set(one, predictor)
        for one in sets:
            one.verify(distributed.rank(), distributed.world_size())
    summary: dict[str, Any] = {"version": SUMMARY_VERSION, "sets": {}, "settings": _described(config, predictor)}
    with held(Path(config.output_dir)):
        begin(sets)
        for one in sets:
            summary["sets"][one.name] = _evaluate_set(one, config, predictor)
        with distributed.shared_errors():
            if distributed.is_main():
                write_json(Path(config.output_dir) / "summary.json", summary)
    return summary


def _evaluate_set(one: EvaluationSet, config: EvaluationConfig, predictor: Predictor | None) -> dict[str, Any]:
    """Score one set and write its files; return its part of the summary, on every rank."""
    folder = Path(config.output_dir) / one.name
    scorer = Scorer(one, config, predictor, folder)
    wanted = scorer.settings()
    log = RecordLog(folder, _fingerprint(one, config, predictor))
    with distributed.shared_errors():
        found = log.read() if distributed.is_main() else {}
    done = distributed.broadcast_object(found)
    missing = {i: frozenset(s for s in wanted if (i, s) not in done) for i in range(len(one))}
    mine = [i for i in missing if missing[i]][distributed.rank() :: distributed.world_size()]
    scored: list[Record] = []
    with distributed.shared_errors(), contextlib.closing(log), progress(mine, f"evaluate {one.name}", "sample") as bar:
        for settings, group in itertools.groupby(mine, key=missing.__getitem__):
            for records in scorer.records(list(group), settings):
                log.add(records)
                scored += records
                bar.update()
    done |= {(r.index, r.setting): r for part in distributed.gather_objects(scored) for r in part}
    records = [done[i, s] for i in range(len(one)) for s in wanted]
    with distributed.shared_errors():
        if distributed.is_main():
            write_parquet(records, folder / "samples.parquet")
    if config.pictures:
        _draw(one, scorer, records, config.pictures, folder)
    return summarize(one, records)


def _fingerprint(one: EvaluationSet, config: EvaluationConfig, predictor: Predictor | None) -> dict[str, Any]:
    """Everything that a record depends on besides its sample and setting. Runs with equal values may share records."""
    shared = {
        "data": one.manifest.data_sha256,
        "protocol": [one.protocol.name, one.protocol.version, repr(one.protocol.log_fit)],
    }
    if predictor is None:
        files = sorted(p for p in Path(config.predictions).rglob("*") if p.is_file())
        return shared | {"predictions": [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]}
    chosen = {name: getattr(config, name) for name in ("aggregation", "save_predictions")}
    return shared | chosen | sampling_settings(config, predictor) | {"weights": weights_sha256(predictor)}


def sampling_settings(config: EvaluationConfig, predictor: Predictor) -> dict[str, Any]:
    """Sampling settings of predictions, except the numbers of steps and members."""
    sampling = {name: getattr(config, name) for name in _SAMPLING}
    return sampling | {
        "schedule": predictor.diffusion.beta_schedule,
        "timestep_spacing": predictor.diffusion.timestep_spacing,
    }


def weights_sha256(predictor: Predictor) -> str:
    """Hash of the network's weights by name and of everything else that determines its predictions."""
    digest = hashlib.sha256(
        repr(
            (
                predictor.model,
                predictor.diffusion,
                predictor.task,
                sorted(predictor.codes.items()),
                sorted(map(str, predictor.fits.items())),
                predictor.codec.sha256,
            )
        ).encode()
    )
    for name, tensor in sorted(predictor.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def _described(config: EvaluationConfig, predictor: Predictor | None) -> dict[str, Any]:
    """Description of how the predictions were made."""
    if predictor is None:
        return {"predictions": config.predictions}
    return {
        **{name: getattr(config, name) for name in ("weights", "use_ema", "aggregation")},
        **sampling_settings(config, predictor),
        "codes": predictor.codes,
        "fits": as_section(predictor.fits),
        "forward_macs": macs(predictor.model).forward,
        "lineage": predictor.lineage,
    }


def _draw(one: EvaluationSet, scorer: Scorer, records: list[Record], count: int, folder: Path) -> None:
    """Draw pages of picked samples and report scenes; every rank repredicts its share, rank 0 assembles them."""
    from dpt.evaluation.pictures import compare, write_page, write_scenes

    picked = pick_samples(one, records, count)
    chosen = {r.index: r for rows in picked.values() for r in rows}
    metric = one.protocol.main_metric
    drawn = {}
    with distributed.shared_errors():
        for index in sorted(chosen)[distributed.rank() :: distributed.world_size()]:
            sample, record = one[index], chosen[index]
            prediction = scorer.prediction(sample, record.setting)
            drawn[index] = compare(
                one.protocol,
                f"{sample.key}: {say(metric, record.metrics[metric])}",
                sample.image,
                sample.truth,
                prediction.value,
                prediction.uncertainty,
                second=sample.second,
                visible=sample.visible_mask,
            )
    rows = {index: row for part in distributed.gather_objects(drawn) for index, row in part.items()}
    if not picked:
        return
    about = {"set": one.name, "task": one.task, "num_samples": len(one), "synthetic": one.manifest.synthetic}
    what = f"{one.name} ({len(one)} {'synthetic ' * one.manifest.synthetic}samples)"
    with distributed.shared_errors():
        for title, samples in picked.items() if distributed.is_main() else ():
            which = "chosen by key, the same for every model" if title == SAME else f"{title} by {name_of(metric)}"
            page = [rows[r.index] for r in samples]
            write_page(page, folder / "pictures" / f"{one.name}_{title}.png", f"{what}: {which}")
        if distributed.is_main():
            write_scenes([(r, rows[r.index]) for r in picked[SAME]], folder / SCENES, metric=metric, about=about)


def run_evaluation(recipe: Recipe, *, read: Callable[..., Weights] = read_weights) -> dict[str, Any]:
    """Run `evaluate` on a recipe's `dpt.evaluation`, recorded in MLflow under the run that trained the weights; `read` as in
    `dpt.evaluation.loading.load_model`."""
    recipe, predictor = open_predictor(recipe, ready_made=bool(recipe.dpt.evaluation.predictions), read=read)
    config, cache_dir = recipe.dpt.evaluation, recipe.dpt.data.cache_dir
    output = Path(config.output_dir)
    with Recording(recipe, predictor, name=f"evaluate {Path(config.predictions or config.weights).name}") as recording:
        summary = evaluate(
            config,
            predictor=predictor,
            cache_dir=cache_dir,
            begin=lambda sets: recording.begin(sets[0].task if predictor is None else predictor.task),
        )
        run, sets = recording.run, summary["sets"]
        run.set_tags({"dpt.dataset": ", ".join(sets), "dpt.protocol": protocol_line(summary)})
        if predictor is not None:
            run.set_tags({"dpt.vae": predictor.codec.record.name})
        for folder in config.data:
            run.log_dataset(**shards_as_dataset(folder, cache_dir))
        run.log_metrics(tracked_metrics(summary), step=0)
        run.log_artifact(output / "summary.json")
        for one in sets:
            run.log_artifact(output / one / "samples.parquet", folder=one)
            if config.pictures and (output / one / SCENES).is_dir():
                run.log_artifact(output / one / SCENES, folder=one)
            for picture in sorted((output / one / "pictures").glob("*.png")):
                run.log_picture(picture, picture.stem)
    return summary
