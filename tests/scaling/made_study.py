"""A study of the planner's tests: made runs in a world whose errors are known."""

import dataclasses
import itertools

import numpy as np
from made_runs import made_run

from dpt.config.sections import ModelConfig
from dpt.models import costs

STEPS = {1: 1.5, 10: 1.0, 100: 1.05}  # too many steps hurt a little
ENSEMBLES = {1: 1.1, 5: 1.0}
WIDTHS = (64, 96, 128)


def config(width, side=16):
    return ModelConfig(hidden_size=width, depth=2, num_heads=4, num_conditions=1, input_size=side, num_classes=8)


def truth(model, pretrain, finetune, upcycled, steps, ensemble):
    """The world: small models saturate, fine-tuning matters more than pre-training, upcycling gains 5%."""
    size = costs.num_params(model).total / 1e5
    error = 0.05 + 0.1 * size**-0.5 + 0.05 * (pretrain / 1e3) ** -0.3 + 0.2 * (finetune / 1e3) ** -0.5
    return error * (0.95 if upcycled else 1.0) * STEPS[steps] * ENSEMBLES[ensemble]


def study(folder=None, noise=0.01, widths=WIDTHS, lengths=(1e3, 4e3), upcycle=(False, True)):
    rng = np.random.default_rng(0)
    runs = []

    def add(name, stage, parents, model, samples, **metrics):
        params = {f"model.{k}": str(getattr(model, k)) for k in ("hidden_size", "depth", "num_heads", "num_conditions")}
        params |= {"model.input_size": "16", "model.num_classes": "8", "upcycling.num_experts": "4"}
        if stage == "upcycle":  # records are of the network that was trained
            params |= {"model.num_experts": "4", "model.top_k": "2"}
        recipe = {
            "train_batch_size": 10,
            "dpt": {
                "model": {"hidden_size": 1},
                "training": {"steps": 100, "checkpoint_every": 50, "warmup_steps": 0},
                "evaluation": {},
            },
        }
        where = folder / name if folder is not None else None
        metrics |= {"train/samples_seen": samples} if samples else {}
        runs.append(made_run(name, stage=stage, parents=parents, params=params, metrics=metrics, folder=where, recipe=recipe))
        return name

    for width, pretrain, finetune in itertools.product(widths, lengths, lengths):
        model = config(width)
        base = add(f"p{width}_{pretrain}_{finetune}", "pretrain", [], model, pretrain)
        tuned = add(f"f{width}_{pretrain}_{finetune}", "finetune", [base], model, finetune)
        for upcycled in upcycle:
            late = finetune / 2
            final = add(f"u{width}_{pretrain}_{finetune}", "upcycle", [tuned], model, late) if upcycled else tuned
            total = finetune + late if upcycled else finetune
            metrics = {}
            for steps, ensemble in itertools.product(STEPS, ENSEMBLES):
                error = truth(model, pretrain, total, upcycled, steps, ensemble) * np.exp(noise * rng.normal())
                metrics[f"eval/depth/abs_rel/s{steps}_n{ensemble}"] = float(error)
            add(f"e_{final}", "evaluate", [final], model, 0, **metrics)
    return runs


def again(runs, prefix, stages, change):
    """The runs of these stages a second time under other names, with the fields that `change` gives for each."""
    names = {r.run_id: prefix + r.run_id for r in runs if r.stage in stages}
    made = []
    for run in runs:
        if name := names.get(run.run_id):
            fields = {"parents": [names.get(parent, parent) for parent in run.parents]} | change(run)
            made.append(dataclasses.replace(run, run_id=name, name=name, **fields))
    return made


def scaled(metrics, gain):
    return {k: v * gain if k.startswith("eval") else v for k, v in metrics.items()}


def one_step(runs, gain, **params):
    """Dense fine-tunings and their evaluations again, trained at the last timestep: one step with such an error."""

    def change(run):
        metrics = {k: v for k, v in run.metrics.items() if not k.startswith("eval")}
        if run.stage == "evaluate":
            metrics = {"eval/depth/abs_rel/s1_n1": run.metrics["eval/depth/abs_rel/s10_n5"] * gain}
        return {"metrics": metrics, "params": run.params | {"diffusion.timesteps": "last", "data.vae": "embedded"} | params}

    return again(runs, "one_", ("finetune", "evaluate"), change)


def from_scratch(runs, gain):
    """The runs after pre-training again, as if there had been none, with errors `gain` times as large."""

    def change(run):
        return {"metrics": scaled(run.metrics, gain)} | ({"parents": []} if run.stage == "finetune" else {})

    return again(runs, "scratch_", ("finetune", "upcycle", "evaluate"), change)
