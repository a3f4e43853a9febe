"""The evaluator: every sample of every set predicted and scored once, on any number of ranks, under all settings of a sweep."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpt import distributed, hub
from dpt.config.recipe import Recipe
from dpt.config.sections import DataConfig, EvaluationConfig
from dpt.data.shards import ShardFolder
from dpt.errors import UserError
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.records import Record, RecordLog, write_parquet
from dpt.evaluation.scoring import Scorer
from dpt.evaluation.sets import EvaluationSet, open_sets
from dpt.evaluation.summary import SAME, pick_samples, protocol_line, summarize, tracked_metrics
from dpt.fits import as_section
from dpt.locking import held
from dpt.models.attention import use_backend
from dpt.models.costs import macs
from dpt.models.pretrained import read_weights
from dpt.models.weights import Weights
from dpt.progress import progress
from dpt.scores import name_of, say
from dpt.tasks import DEPTH_PROMPT

SUMMARY_VERSION = 1
SCENES = "scenes"
"""Folder of the scenes of reports, below the set's own (`dpt.evaluation.scenes`)."""


def evaluate(
    config: EvaluationConfig,
    *,
    predictor: Predictor | None = None,
    cache_dir: str = "",
    begin: Callable[[list[EvaluationSet]], object] = len,
) -> dict[str, Any]:
    """Score `config.data` with `predictor` (default: from `config.weights`), or the ready-made `config.predictions`.

    `cache_dir`: folder that keeps shards fetched from URLs. `begin` is called with the sets once nothing can be refused any
    more, and before anything is scored.

    Writes, below `config.output_dir`: summary.json; and for each set SET/samples.parquet, SET/pictures/*.png and, while it
    lasts, SET/parts, from which an interrupted run goes on. Returns the summary, on every rank. UserError for bad input.
    """
    if not config.predictions and predictor is None and not config.weights:
        raise UserError("dpt.evaluation.weights is empty; name the weights to evaluate, or ready-made predictions.")
    sets = open_sets(config.data, protocol=config.protocol, max_samples=config.max_samples, cache_dir=cache_dir)
    if config.predictions:
        predictor = None
    elif predictor is None:
        predictor = Predictor(config.weights, config=config)
    if predictor is not None and (settled := config.settled(predictor.diffusion)) != config:
        distributed.log("These weights predict in one pass: dpt.evaluation.steps and ensemble are 1.")
        config = settled
    for one in sets:
        check_set(one, predictor)
        _name_other_fit(one, predictor)
    with distributed.shared_errors():
        for one in sets:
            one.verify(distributed.rank(), distributed.world_size())
    summary: dict[str, Any] = {"version": SUMMARY_VERSION, "sets": {}, "settings": _described(config, predictor)}
    with held(Path(config.output_dir)):
        begin(sets)
        for one in sets:
            summary["sets"][one.name] = _evaluate_set(one, config, predictor)
        if distributed.is_main():
            _write_json(Path(config.output_dir) / "summary.json", summary)
        distributed.barrier()
    return summary


def check_set(one: EvaluationSet, predictor: Predictor | None) -> None:
    """UserError if the model cannot predict for the set: another task, other conditions, latents of another VAE, no CLIP
    embeddings where it takes them, depth prompts made of the truth that it has not learnt with."""
    if predictor is None:
        return
    predictor.check_task(one.task)
    width = predictor.model.clip_embedding_size
    if width and one.task == "amodal":
        stored = one.manifest.members["clip"].shape[-1] if "clip" in one.manifest.members else 0
        if stored != width:
            have = f"CLIP embeddings of {stored} numbers" if stored else "no CLIP embeddings"
            raise UserError(
                f"{one.folder}: the shards hold {have}, the weights take {width}; encode the set anew with --clip and the "
                "image tower that they were trained with."
            )
    available = one.manifest.members["cond_latents"].shape[0]
    if predictor.model.num_conditions > available:
        raise UserError(f"{one.folder}: {available} condition latents, but the model takes {predictor.model.num_conditions}.")
    if difference := predictor.codec.record.difference(dataclasses.asdict(one.manifest.vae)):
        raise UserError(
            f"{one.folder}: the latents were made by VAE {one.manifest.vae.name!r}, the model's is another one ({difference}); "
            "encode the set with the model's VAE."
        )
    _check_depth_prompt(one, predictor)


def _name_other_fit(one: EvaluationSet, predictor: Predictor | None) -> None:
    """Say so where a set's pictures came to their size in another way than those that the network learnt with."""
    fit = one.manifest.fit
    if fit is None or predictor is None or not predictor.fits[one.task].resolution:
        return
    learnt = predictor.fits[one.task]
    if (fit.whole, fit.resolution) != (learnt.whole, learnt.resolution):
        distributed.log(f"{one.name}: encoded with --fit {fit}; the weights learnt with {learnt}, which dpt predict follows.")


def _check_depth_prompt(one: EvaluationSet, predictor: Predictor) -> None:
    """UserError if the network is shown prompts that are made of the truth and has not learnt with them; where it has learnt
    with them and is shown the all-valid one, that is said, and the summary names it."""
    learnt = predictor.depth_prompt
    if predictor.model.num_conditions < 2 or one.depth_prompt in ("", learnt):
        return
    if one.depth_prompt != DEPTH_PROMPT:
        raise UserError(
            f"{one.folder}: encoded with --prompt {one.depth_prompt}, the weights learnt with {learnt}; encode the set with "
            f"--prompt {learnt}."
        )
    distributed.log(f"{one.name}: depth is asked with the prompt {one.depth_prompt}; the weights learnt with {learnt}.")


def _evaluate_set(one: EvaluationSet, config: EvaluationConfig, predictor: Predictor | None) -> dict[str, Any]:
    """Score one set and write its files; its part of the summary, on every rank."""
    folder = Path(config.output_dir) / one.name
    scorer = Scorer(one, config, predictor, folder)
    wanted = scorer.settings()
    log = RecordLog(folder, _fingerprint(one, config, predictor), rank=distributed.rank())
    done = distributed.broadcast_object(log.read() if distributed.is_main() else {})
    missing = {i: frozenset(s for s in wanted if (i, s) not in done) for i in range(len(one))}
    mine = [i for i in missing if missing[i]][distributed.rank() :: distributed.world_size()]
    scored: list[Record] = []
    with progress(mine, f"evaluate {one.name}", "sample") as bar:
        for settings, group in itertools.groupby(mine, key=missing.__getitem__):
            for records in scorer.records(list(group), settings):
                log.add(records)
                scored += records
                bar.update()
    log.close()
    done |= {(r.index, r.setting): r for part in distributed.gather_objects(scored) for r in part}
    records = [done[i, s] for i in range(len(one)) for s in wanted]
    if distributed.is_main():
        write_parquet(records, folder / "samples.parquet")
    if config.pictures:
        _draw(one, scorer, records, config.pictures, folder)
    return summarize(one, records)


def _fingerprint(one: EvaluationSet, config: EvaluationConfig, predictor: Predictor | None) -> dict[str, Any]:
    """All that a record depends on beside its sample and setting. Equal ones may share records."""
    shared = {
        "data": one.manifest.data_sha256,
        "protocol": [one.protocol.name, one.protocol.version, repr(one.protocol.log_fit)],
    }
    if predictor is None:
        files = sorted(p for p in Path(config.predictions).rglob("*") if p.is_file())
        return shared | {"predictions": [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]}
    names: tuple[str, ...] = ("aggregation", "sampler", "eta", "step_power", "guidance_scale", "guidance_low", "guidance_high")
    names += ("precision", "seed", "save_predictions")
    sampling = {name: getattr(config, name) for name in names}
    chosen = {"schedule": predictor.diffusion.beta_schedule, "timestep_spacing": predictor.diffusion.timestep_spacing}
    return shared | sampling | chosen | {"weights": weights_sha256(predictor)}


def weights_sha256(predictor: Predictor) -> str:
    """Hash of the network's weights by name and of what else decides its predictions."""
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
    """How the predictions were made."""
    if predictor is None:
        return {"predictions": config.predictions}
    names = (
        "weights",
        "use_ema",
        "aggregation",
        "sampler",
        "eta",
        "step_power",
        "guidance_scale",
        "guidance_low",
        "guidance_high",
    )
    return {
        **{name: getattr(config, name) for name in (*names, "precision", "seed")},
        "schedule": predictor.diffusion.beta_schedule,
        "timestep_spacing": predictor.diffusion.timestep_spacing,
        "codes": predictor.codes,
        "fits": as_section(predictor.fits),
        "forward_macs": macs(predictor.model).forward,
        "lineage": predictor.lineage,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def _draw(one: EvaluationSet, scorer: Scorer, records: list[Record], count: int, folder: Path) -> None:
    """Pages of telling samples, and the scenes of reports; every rank predicts its share again, rank 0 puts all together."""
    from dpt.evaluation.pictures import compare, write_page
    from dpt.evaluation.scenes import Scene, write_scenes

    picked = pick_samples(one, records, count)
    chosen = {r.index: r for rows in picked.values() for r in rows}
    metric = one.protocol.main_metric
    drawn = {}
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
    if not distributed.is_main() or not picked:
        return
    about = {"set": one.name, "task": one.task, "num_samples": len(one), "synthetic": one.manifest.synthetic}
    what = f"{one.name} ({len(one)} {'synthetic ' * one.manifest.synthetic}samples)"
    for title, samples in picked.items():
        which = "drawn by key, the same for every model" if title == SAME else f"{title} by {name_of(metric)}"
        page = [rows[r.index] for r in samples]
        write_page(page, folder / "pictures" / f"{one.name}_{title}.png", f"{what}: {which}")
    scenes = [Scene(key=r.key, value=r.metrics[metric], row=rows[r.index]) for r in picked[SAME]]
    write_scenes(scenes, folder / SCENES, setting=picked[SAME][0].setting, metric=metric, about=about)


def as_evaluated(recipe: Recipe, predictor: Predictor | None, task: str) -> Recipe:
    """The recipe with the task, network and objective of the weights that are evaluated, which are what runs are found by."""
    changes: dict[str, Any] = {"task": task}
    if predictor is not None:
        changes |= {"model": predictor.model, "diffusion": predictor.diffusion}
    return dataclasses.replace(recipe, dpt=dataclasses.replace(recipe.dpt, **changes))


def run_evaluation(recipe: Recipe, *, read: Callable[..., Weights] = read_weights) -> dict[str, Any]:
    """`evaluate` a recipe's `dpt.evaluation`, recorded in MLflow under the run that trained the weights; `read` as in
    `dpt.evaluation.loading.load_model`."""
    from dpt.tracking import Run, start_run

    config = replace(recipe.dpt.evaluation, weights=hub.pinned(recipe.dpt.evaluation.weights))
    recipe = replace(recipe, dpt=replace(recipe.dpt, evaluation=config))
    distributed.log(use_backend(recipe.dpt.attention_backend))
    output = Path(config.output_dir)
    vae = recipe.dpt.data.vae if recipe.dpt.data.vae != DataConfig().vae else ""  # the default: the one that the weights name
    predictor = None
    if config.weights and not config.predictions:
        predictor = Predictor(config.weights, config=config, vae=vae, read=read)
    parent = str(predictor.lineage.get("run_id") or "") if predictor is not None else ""
    name = f"evaluate {Path(config.predictions or config.weights).name}"
    with contextlib.ExitStack() as stack:
        runs: list[Run] = []

        def begin(sets: list[EvaluationSet]) -> None:
            task = predictor.task if predictor is not None else sets[0].task
            with distributed.shared_errors():
                started = start_run(
                    recipe.dpt.tracking,
                    stage="evaluate",
                    name=name,
                    params=as_evaluated(recipe, predictor, task).to_dict(),
                    parents=[parent],
                    output_dir=output,
                    tags={},
                )
            runs.append(stack.enter_context(started))

        summary = evaluate(config, predictor=predictor, cache_dir=recipe.dpt.data.cache_dir, begin=begin)
        (run,) = runs
        sets = summary["sets"]
        run.set_tags({"dpt.dataset": ", ".join(sets), "dpt.protocol": protocol_line(summary)})
        for folder in config.data:
            manifest = ShardFolder(folder, cache_dir=recipe.dpt.data.cache_dir).manifest
            run.log_dataset(
                f"{manifest.dataset}/{manifest.split}",
                digest=manifest.data_sha256,
                source=folder,
                context="evaluation",
                profile=manifest.profile,
            )
        run.log_metrics(tracked_metrics(summary), step=0)
        run.log_artifact(output / "summary.json")
        for one in sets:
            run.log_artifact(output / one / "samples.parquet", folder=one)
            if config.pictures and (output / one / SCENES).is_dir():
                run.log_artifact(output / one / SCENES, folder=one)
            for picture in sorted((output / one / "pictures").glob("*.png")):
                run.log_picture(picture, picture.stem)
    return summary
