"""A surface is learned from made runs, and a budget is spent where it pays."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import yaml
from made_runs import made_run

from dpt import cli
from dpt.commands import plan as command
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models import costs
from dpt.scaling.observations import Setting, added_macs, factor_values, observe
from dpt.scaling.plan_files import write_plan
from dpt.scaling.planner import Limits, best_plan, naive_plan
from dpt.scaling.surface import fit_surface

STEPS = {1: 1.5, 10: 1.0, 100: 1.05}  # too many steps hurt a little
ENSEMBLES = {1: 1.1, 5: 1.0}
WIDTHS = (64, 96, 128)


def config(width):
    return ModelConfig(hidden_size=width, depth=2, num_heads=4, num_conditions=1, input_size=16, num_classes=8)


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


@pytest.fixture(scope="module")
def surface():
    runs = study()
    return fit_surface(observe(runs, runs, "depth", "abs_rel"), samples=30)


def test_models_of_another_task_are_no_observations():
    runs = study()
    generalist = [
        dataclasses.replace(r, params={**r.params, "task": "generalist"}) if r.stage == "finetune" else r for r in runs
    ]
    of_depth = observe(generalist, generalist, "depth", "abs_rel")
    trained = {r.run_id: r.stage for r in runs}
    assert {trained[o.run_id] for o in of_depth} == {"upcycle"}
    alone = [dataclasses.replace(r, params={**r.params, "task": "generalist"}) for r in runs]
    assert len(observe(alone, alone, "depth", "abs_rel")) == len(observe(runs, runs, "depth", "abs_rel"))


def test_the_surface_predicts_what_it_has_not_seen(surface):
    assert surface.factors == ["model", "pretrain", "finetune"]
    assert surface.ranges["model"] == tuple(float(costs.num_params(config(w)).total) for w in (min(WIDTHS), max(WIDTHS)))
    for width, pretrain, finetune, upcycled in ((64, 2e3, 3e3, False), (128, 3e3, 2e3, True), (96, 4e3, 1e3, False)):
        quantities = factor_values(config(width), pretrain, finetune)
        true = truth(config(width), pretrain, finetune, upcycled, 10, 5)
        setting = {"upcycled": upcycled, "setting": Setting("", 10, 5)}
        assert surface.expected(quantities, **setting) == pytest.approx(true, rel=0.04)
        low, high = surface.interval(quantities, **setting)
        assert low < true * 1.02
        assert high > true * 0.98


def test_the_slopes_are_those_of_the_errors(surface):
    from scipy.optimize import approx_fprime, least_squares

    from dpt.scaling import surface as module

    seen = {}

    def spy(function, guess, jac, **options):
        seen["difference"] = np.abs(approx_fprime(guess, function, 1e-7) - jac(guess)).max()
        return least_squares(function, guess, jac=jac, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scipy.optimize.least_squares", spy)
        runs = from_scratch(study(), 1.1)
        module.fit_surface(observe(runs, runs, "depth", "abs_rel"), samples=1)
    assert seen["difference"] < 1e-5


def test_the_plan_beats_the_naive_one_in_the_true_world(surface):
    models = [config(w) for w in WIDTHS]
    limits = Limits(train_macs=1e12)
    best, naive = best_plan(surface, models, limits), naive_plan(surface, models, limits)

    def true(plan):
        upcycled = plan.upcycle_samples > 0
        tuned = plan.finetune_samples + plan.upcycle_samples
        return truth(plan.config, plan.pretrain_samples, tuned, upcycled, plan.setting.steps, plan.setting.ensemble)

    assert true(best) < true(naive)
    assert best.train_macs == pytest.approx(1e12, rel=1e-6)
    assert best.setting.steps == 10
    assert best.finetune_samples + best.upcycle_samples > best.pretrain_samples


def test_limits_hold_and_what_cannot_be_afforded_is_said(surface):
    models = [config(w) for w in WIDTHS]
    forward = min(costs.macs(m).forward for m in models)
    plan = best_plan(surface, models, Limits(train_macs=1e12, test_macs=10.5 * forward))
    assert plan.test_macs <= 10.5 * forward
    with pytest.raises(UserError, match="no observed setting predicts within"):
        best_plan(surface, models, Limits(train_macs=1e12, test_macs=1.0))


def test_extrapolation_is_said(surface):
    models = [config(w) for w in WIDTHS]
    inside = best_plan(surface, models[:1], Limits(train_macs=6e10))
    beyond = best_plan(surface, [config(256)], Limits(train_macs=1e15))
    assert any("model" in s and "above the observed range" in s for s in beyond.extrapolations(surface))
    assert any(s.startswith("pretrain") for s in beyond.extrapolations(surface))
    assert not any(s.startswith("model") for s in inside.extrapolations(surface))


def test_a_stage_that_was_not_varied_keeps_its_length():
    runs = study(widths=(64, 80, 96, 128), upcycle=(False,))
    fixed = [r for r in runs if r.name.split("_")[-2] == "1000.0"]  # of the pre-training
    surface = fit_surface(observe(fixed, runs, "depth", "abs_rel"), samples=10)
    assert "pretrain" not in surface.factors
    plan = best_plan(surface, [config(64)], Limits(train_macs=1e12))
    assert plan.pretrain_samples == 1e3
    with pytest.raises(UserError, match="least that a plan takes"):
        best_plan(surface, [config(64)], Limits(train_macs=1e3))


def one_step(runs, gain, pixel_loss="0.0"):
    """The fine-tunings of `study` and their evaluations again, trained at the last timestep: one step with such an error."""
    names = {r.run_id: f"one_{r.run_id}" for r in runs if r.stage in ("finetune", "evaluate")}
    made = []
    for run in runs:
        if run.run_id in names and (run.stage == "finetune" or "e_f" in run.name):
            metrics = {k: v for k, v in run.metrics.items() if not k.startswith("eval")}
            if run.stage == "evaluate":
                metrics = {"eval/depth/abs_rel/s1_n1": run.metrics["eval/depth/abs_rel/s10_n5"] * gain}
            params = run.params | {"diffusion.timesteps": "last", "pixel_loss.weight": pixel_loss, "data.vae": "embedded"}
            parents = [names.get(parent, parent) for parent in run.parents]
            fields = {"run_id": names[run.run_id], "name": names[run.run_id]}
            made.append(dataclasses.replace(run, **fields, params=params, metrics=metrics, parents=parents))
    return made


@pytest.mark.parametrize(("gain", "chosen"), [(0.8, 1), (1.3, 10)])
def test_methods_of_fine_tuning_are_chosen_among(gain, chosen):
    runs = study(upcycle=(False,))
    runs += one_step(runs, gain)
    surface = fit_surface(observe(runs, runs, "depth", "abs_rel"), samples=5)
    plan = best_plan(surface, [config(w) for w in WIDTHS], Limits(train_macs=1e12))
    assert plan.setting.steps == chosen
    assert ("diffusion.timesteps=last" in plan.setting.method) == (chosen == 1)
    assert {s.ensemble for s in surface.settings if "last" in s.method} == {1}  # others were not seen with it


def test_a_pixel_loss_costs_the_decoder():
    runs = study(upcycle=(False,))
    runs += one_step(runs, 0.8, pixel_loss="1.0")
    surface = fit_surface(observe(runs, runs, "depth", "abs_rel"), samples=5)
    added = {s.method: added_macs(recipe, config(64)) for s, recipe in surface.settings.items()}
    assert sorted(macs > 0 for macs in added.values()) == [False, True]
    plan = best_plan(surface, [config(64)], Limits(train_macs=1e12))
    tuned = plan.finetune_samples * (costs.macs(config(64)).training + added[plan.setting.method])
    assert plan.pretrain_samples * costs.macs(config(64)).training + tuned == pytest.approx(1e12, rel=1e-6)


def test_aligned_hidden_states_are_a_method_whose_cost_grows_with_the_model():
    runs = study(upcycle=(False,))
    aligned = {
        "training.self_alignment.weight": "0.2",
        "training.self_alignment.student_block": "1",
        "training.self_alignment.teacher_block": "2",
    }
    runs += [dataclasses.replace(r, params=r.params | aligned) for r in one_step(runs, 0.8)]
    surface = fit_surface(observe(runs, runs, "depth", "abs_rel"), samples=5)
    own = next(s for s in surface.settings if "training.self_alignment.weight=0.2" in s.method)
    small, large = (added_macs(surface.settings[own], config(width)) for width in (64, 128))
    assert 0 < 2 * small < large


def test_tokens_that_bypass_blocks_save_their_compute():
    runs = study(upcycle=(False,))
    bypass = {"training.bypass_share": "0.5", "training.bypass_first": "0", "training.bypass_last": "1"}
    runs += [dataclasses.replace(r, params=r.params | bypass) for r in one_step(runs, 0.8)]
    surface = fit_surface(observe(runs, runs, "depth", "abs_rel"), samples=5)
    saved = {s.method: added_macs(recipe, config(64)) for s, recipe in surface.settings.items()}
    assert sorted(macs < 0 for macs in saved.values()) == [False, True]
    assert all("bypass_share=0.5" in method for method, macs in saved.items() if macs < 0)


def from_scratch(runs, gain):
    """The runs with as many that were never pre-trained, whose errors are `gain` times as large."""
    renamed = {r.run_id: f"scratch_{r.run_id}" for r in runs if r.stage != "pretrain"}
    made = []
    for run in runs:
        if run.run_id in renamed:
            parents = [renamed[p] for p in run.parents if p in renamed]
            metrics = {k: v * gain if k.startswith("eval") else v for k, v in run.metrics.items()}
            fields = {"run_id": renamed[run.run_id], "name": renamed[run.run_id]}
            made.append(dataclasses.replace(run, **fields, parents=parents, metrics=metrics))
    return [*runs, *made]


@pytest.mark.parametrize(("gain", "pretrained"), [(0.8, False), (1.3, True)])
def test_training_from_scratch_is_planned_where_it_was_seen_to_pay(gain, pretrained, tmp_path):
    runs = from_scratch(study(tmp_path, upcycle=(False,)), gain)
    observations = observe(runs, runs, "depth", "abs_rel")
    surface = fit_surface(observations, samples=5)
    assert surface.scratch
    assert surface.ranges["pretrain"] == (1e3, 4e3)
    quantities = factor_values(config(96), 0, 2e3)
    from_known = np.sqrt(gain**2 * truth(config(96), 1e3, 2e3, False, 10, 5) * truth(config(96), 4e3, 2e3, False, 10, 5))
    assert surface.expected(quantities, upcycled=False, setting=Setting("", 10, 5)) == pytest.approx(from_known, rel=0.04)
    plan = best_plan(surface, [config(w) for w in WIDTHS], Limits(train_macs=1e11))
    assert (plan.pretrain_samples > 0) == pretrained
    assert not any(s.startswith("pretrain") for s in plan.extrapolations(surface)) or pretrained
    assert plan.train_macs == pytest.approx(1e11, rel=1e-6)
    nearest = min(observations, key=plan.distance)
    assert (nearest.config, nearest.quantities["pretrain"] > 0) == (plan.config, pretrained)
    evaluated = next(r for r in runs if r.stage == "evaluate")
    content = yaml.safe_load(write_plan(plan, evaluated, runs, tmp_path / "plan", experiment="e", seeds=3).read_text())
    assert ("pretrain" in content["stages"]) == pretrained
    assert ("weights" in content["stages"]["finetune"]) == pretrained
    assert list(content["axes"]["seed"]["values"]) == ["s0", "s1", "s2"]


def test_a_study_of_models_from_scratch_alone_is_planned_from():
    known = study(upcycle=(False,))
    runs = [r for r in from_scratch(known, 1.0) if r not in known]
    surface = fit_surface(observe(runs, runs, "depth", "abs_rel"), samples=5)
    plan = best_plan(surface, [config(w) for w in WIDTHS], Limits(train_macs=1e11))
    assert plan.pretrain_samples == 0
    assert 0 < plan.expected < 1


def test_beside_one_length_of_pre_training_models_from_scratch_do_not_count():
    known = [r for r in study(upcycle=(False,)) if r.name.split("_")[-2] == "1000.0"]
    runs = from_scratch(known, 2.0)
    with_both, alone = (fit_surface(observe(some, some, "depth", "abs_rel"), samples=5) for some in (runs, known))
    assert not with_both.scratch
    assert np.array_equal(with_both.parameters, alone.parameters)


def test_models_that_start_from_imported_weights_are_no_observations():
    runs = from_scratch(study(upcycle=(False,)), 1.0)
    started = {r.run_id: {"training.weights": "released"} for r in runs if r.stage == "finetune" and not r.parents}
    imported = [dataclasses.replace(r, params=r.params | started.get(r.run_id, {})) for r in runs]
    known = study(upcycle=(False,))
    assert len(observe(imported, imported, "depth", "abs_rel")) == len(observe(known, known, "depth", "abs_rel"))


def test_a_method_is_planned_on_latents_that_it_was_seen_on():
    """The evaluations at 16 x 16 latents are by the usual method alone, those at 8 x 8 by the better one too."""
    runs = study(upcycle=(False,))
    small = {r.run_id: f"small_{r.run_id}" for r in runs}
    resized = [
        dataclasses.replace(
            r,
            run_id=small[r.run_id],
            parents=[small[p] for p in r.parents],
            params=r.params | {"model.input_size": "8"},
            metrics={k: v * 1.2 if k.startswith("eval") else v for k, v in r.metrics.items()},
        )
        for r in runs
    ]
    runs += resized + one_step(resized, 0.8)
    surface = fit_surface(observe(runs, runs, "depth", "abs_rel"), samples=5)
    large, small_latents = ([dataclasses.replace(config(w), input_size=side) for w in WIDTHS] for side in (16, 8))
    assert "last" not in best_plan(surface, large, Limits(train_macs=1e12)).setting.method
    assert "last" in best_plan(surface, small_latents, Limits(train_macs=1e12)).setting.method


def test_too_few_runs_are_refused():
    runs = study(widths=(64,), lengths=(1e3,))
    with pytest.raises(UserError, match="at least 4 models"):
        fit_surface(observe(runs, runs, "depth", "abs_rel"))


def test_the_command_writes_recipes_and_a_study(monkeypatch, tmp_path, capsys):
    runs = study(tmp_path / "runs")
    monkeypatch.setattr(command, "selected_runs", lambda arguments: (runs, runs))
    assert cli.main(["plan", "--budget", "1e12", "--out", str(tmp_path / "plan"), "--naive"]) == 0
    output = capsys.readouterr().out
    assert "Plan for 1 TMACs of training" in output
    for name in ("best", "naive"):
        content = yaml.safe_load((tmp_path / "plan" / name / "study.yaml").read_text())
        recipe = json.loads((tmp_path / "plan" / name / "finetune.json").read_text())
        assert content["stages"]["finetune"]["weights"] == "pretrain"
        assert recipe["dpt"]["model"]["hidden_size"] in WIDTHS
        assert recipe["dpt"]["training"]["checkpoint_every"] == pytest.approx(recipe["dpt"]["training"]["steps"] / 2, abs=1)
    naive = json.loads((tmp_path / "plan" / "naive" / "pretrain.json").read_text())
    per_sample = costs.macs(config(naive["dpt"]["model"]["hidden_size"])).training
    assert naive["dpt"]["training"]["steps"] * 10 * per_sample == pytest.approx(0.5e12, rel=0.01)
