"""A surface is learned from made runs, and a budget is spent where it pays."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from made_study import WIDTHS, again, config, from_scratch, one_step, scaled, study, truth

from dpt import cli
from dpt.commands import plan as command
from dpt.config.recipe import DptConfig, Recipe
from dpt.config.sections import TrainingConfig
from dpt.errors import UserError
from dpt.models import costs
from dpt.models.recipe_costs import recipe_macs, step_macs
from dpt.scaling.observations import Setting, added_macs, factor_values, observe
from dpt.scaling.plan_files import write_plan
from dpt.scaling.planner import Limits, best_plan, make_plan, naive_plan
from dpt.scaling.surface import fit_surface

MODELS = [config(w) for w in WIDTHS]


def observed(runs):
    return observe(runs, runs, "depth", "abs_rel")


def fitted(runs, samples=5):
    return fit_surface(observed(runs), samples=samples)


def planned(surface, models=MODELS, train_macs=1e12, **limits):
    return best_plan(surface, models, Limits(train_macs=train_macs, **limits))


@pytest.fixture(scope="module")
def surface():
    return fitted(study(), samples=30)


@pytest.fixture(scope="module")
def dense():
    """Runs without upcycling."""
    return study(upcycle=(False,))


def test_models_of_another_task_are_no_observations():
    runs = study()

    def generalist(*stages):
        return [dataclasses.replace(r, params=r.params | {"task": "generalist"}) if r.stage in stages else r for r in runs]

    trained = {r.run_id: r.stage for r in runs}
    assert {trained[o.run_id] for o in observed(generalist("finetune"))} == {"upcycle"}
    assert len(observed(generalist("finetune", "upcycle"))) == len(observed(runs))


def test_runs_that_are_all_upcycled_are_no_ground_for_a_naive_plan():
    surface = fitted(study(upcycle=(True,)))
    with pytest.raises(UserError, match="no model of the plan was observed as it would be trained"):
        naive_plan(surface, MODELS, Limits(train_macs=1e12))


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

    seen = {}

    def spy(function, guess, jac, **options):
        seen["difference"] = np.abs(approx_fprime(guess, function, 1e-7) - jac(guess)).max()
        return least_squares(function, guess, jac=jac, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scipy.optimize.least_squares", spy)
        fitted(study() + from_scratch(study(), 1.1), samples=1)
    assert seen["difference"] < 1e-5


def test_the_plan_beats_the_naive_one_in_the_true_world(surface):
    best, naive = planned(surface), naive_plan(surface, MODELS, Limits(train_macs=1e12))

    def true(plan):
        upcycled = plan.upcycle_samples > 0
        tuned = plan.finetune_samples + plan.upcycle_samples
        return truth(plan.config, plan.pretrain_samples, tuned, upcycled, plan.setting.steps, plan.setting.ensemble)

    assert true(best) < true(naive)
    assert best.train_macs == pytest.approx(1e12, rel=1e-6)
    assert best.setting.steps == 10
    assert best.finetune_samples + best.upcycle_samples > best.pretrain_samples


def test_limits_hold_and_what_cannot_be_afforded_is_said(surface):
    forward = min(costs.macs(m).forward for m in MODELS)
    assert planned(surface, test_macs=10.5 * forward).test_macs <= 10.5 * forward
    with pytest.raises(UserError, match="no observed setting predicts within"):
        planned(surface, test_macs=1.0)


def test_extrapolation_is_said(surface):
    inside, beyond = planned(surface, MODELS[:1], 6e10), planned(surface, [config(256)], 1e15)
    assert any("model" in s and "above the observed range" in s for s in beyond.extrapolations(surface))
    assert any(s.startswith("pretrain") for s in beyond.extrapolations(surface))
    assert not any(s.startswith("model") for s in inside.extrapolations(surface))


def test_a_stage_that_was_not_varied_keeps_its_length():
    runs = study(widths=(64, 80, 96, 128), upcycle=(False,))
    fixed = [r for r in runs if r.name.split("_")[-2] == "1000.0"]  # of the pre-training
    surface = fit_surface(observe(fixed, runs, "depth", "abs_rel"), samples=10)
    assert "pretrain" not in surface.factors
    assert planned(surface, MODELS[:1]).pretrain_samples == 1e3
    with pytest.raises(UserError, match="least that a plan takes"):
        planned(surface, MODELS[:1], 1e3)


@pytest.mark.parametrize(("gain", "chosen"), [(0.8, 1), (1.3, 10)])
def test_methods_of_fine_tuning_are_chosen_among(gain, chosen, dense):
    surface = fitted(dense + one_step(dense, gain))
    plan = planned(surface)
    assert plan.setting.steps == chosen
    assert ("diffusion.timesteps=last" in plan.setting.method) == (chosen == 1)
    assert {s.ensemble for s in surface.settings if "last" in s.method} == {1}  # others were not seen with it


ALIGNED = {f"training.self_alignment.{name}": text for name, text in
           (("weight", "0.2"), ("student_block", "1"), ("teacher_block", "2"))}  # fmt: skip
BYPASS = {f"training.bypass_{name}": text for name, text in (("share", "0.5"), ("first", "0"), ("last", "1"))}


@pytest.mark.parametrize(
    ("params", "method", "sign", "grows"),
    [
        ({"pixel_loss.weight": "1.0"}, "pixel_loss.weight=1.0", 1, False),  # the decoder's
        (ALIGNED, "training.self_alignment.weight=0.2", 1, True),
        (BYPASS, "training.bypass_share=0.5", -1, True),  # tokens that bypass blocks save their compute
        ({"optimizer.type": "Muon", "train_batch_size": "16"}, "optimizer.type=Muon", 1, True),
    ],
)
def test_a_plan_counts_what_a_method_adds(params, method, sign, grows, dense):
    surface = fitted(dense + one_step(dense, 0.8, **params))
    added, of_larger = (
        {s.method: added_macs(recipe, config(width)) for s, recipe in surface.settings.items()} for width in (64, 128)
    )
    (usual,) = (name for name in added if method not in name)
    (own,) = added.keys() - {usual}
    assert added[usual] == 0
    assert sign * added[own] > 0
    assert (of_larger[own] > 2 * added[own] > 0 or of_larger[own] < 2 * added[own] < 0) == grows
    plan = planned(surface, MODELS[:1])
    per_sample = costs.macs(config(64)).training
    tuned = plan.finetune_samples * (per_sample + added[plan.setting.method])
    assert plan.pretrain_samples * per_sample + tuned == pytest.approx(1e12, rel=1e-6)


def test_a_plan_counts_what_methods_add_to_pre_training_and_after_upcycling():
    batch = {"train_micro_batch_size_per_gpu": "4", "gradient_accumulation_steps": "2"}
    params = {"pretrain": {"optimizer.type": "Muon", **batch}, "finetune": BYPASS, "upcycle": BYPASS}
    runs = [dataclasses.replace(run, params=run.params | params.get(run.stage, {}), tags={"dpt.ranks": "2"}) for run in study()]
    surface = fitted(runs)
    plan = make_plan(surface, config(64), Limits(train_macs=1e12), 0.5, 0.25, min(surface.settings))
    muon = Recipe(deepspeed={"optimizer": {"type": "Muon"}}, dpt=DptConfig())
    bypass = DptConfig(training=TrainingConfig(bypass_share=0.5, bypass_first=0, bypass_last=1))
    dense, experts = config(64), plan.upcycling.apply(config(64))
    spent = plan.pretrain_samples * step_macs(muon, dense, 16).training  # 4 x 2 micro-batches x 2 ranks
    spent += plan.finetune_samples * recipe_macs(bypass, dense).training
    spent += plan.upcycle_samples * recipe_macs(bypass, experts).training
    assert spent == pytest.approx(1e12, rel=1e-6)


@pytest.mark.parametrize(("gain", "pretrained"), [(0.8, False), (1.3, True)])
def test_training_from_scratch_is_planned_where_it_was_seen_to_pay(gain, pretrained, tmp_path):
    known = study(tmp_path, upcycle=(False,))
    runs = known + from_scratch(known, gain)
    observations = observed(runs)
    surface = fit_surface(observations, samples=5)
    assert surface.scratch
    assert surface.ranges["pretrain"] == (1e3, 4e3)
    quantities = factor_values(config(96), 0, 2e3)
    from_known = np.sqrt(gain**2 * truth(config(96), 1e3, 2e3, False, 10, 5) * truth(config(96), 4e3, 2e3, False, 10, 5))
    assert surface.expected(quantities, upcycled=False, setting=Setting("", 10, 5)) == pytest.approx(from_known, rel=0.04)
    plan = planned(surface, train_macs=1e11)
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


def test_a_study_of_models_from_scratch_alone_is_planned_from(dense):
    plan = planned(fitted(from_scratch(dense, 1.0)), train_macs=1e11)
    assert plan.pretrain_samples == 0
    assert 0 < plan.expected < 1


def test_beside_one_length_of_pre_training_models_from_scratch_do_not_count(dense):
    known = [r for r in dense if r.name.split("_")[-2] == "1000.0"]
    with_both, alone = fitted(known + from_scratch(known, 2.0)), fitted(known)
    assert not with_both.scratch
    assert np.array_equal(with_both.parameters, alone.parameters)


def test_models_that_start_from_imported_weights_are_no_observations(dense):
    imported = from_scratch(dense, 1.0)
    for run in imported:
        if run.stage == "finetune":
            run.params["training.weights"] = "released"
    assert len(observed(dense + imported)) == len(observed(dense))


@pytest.mark.parametrize(("field", "value"), [("input_size", 8), ("in_channels", 16)])
def test_a_method_is_planned_on_latents_that_it_was_seen_on(dense, field, value):
    """The evaluations on the usual latents are by the usual method alone, those on others by the better one too."""

    def change(run):
        return {"params": run.params | {f"model.{field}": str(value)}, "metrics": scaled(run.metrics, 1.2)}

    resized = again(dense, "small_", ("pretrain", "finetune", "evaluate"), change)
    surface = fitted(dense + resized + one_step(resized, 0.8))
    assert "last" not in planned(surface).setting.method
    assert "last" in planned(surface, [dataclasses.replace(config(w), **{field: value}) for w in WIDTHS]).setting.method


def test_convolutions_in_the_mlps_are_planned_where_they_were_seen_and_never_upcycled(dense):
    """Networks with them are better by a fifth; without them, some were upcycled."""

    def change(run):
        return {"params": run.params | {"model.mlp_kernel_size": "3"}, "metrics": scaled(run.metrics, 0.8)}

    convolved = again(dense, "convolved_", ("pretrain", "finetune", "evaluate"), change)
    models = [dataclasses.replace(model, mlp_kernel_size=kernel) for model in MODELS for kernel in (0, 3)]
    plan = planned(fitted(study() + convolved), models)
    assert plan.config.mlp_kernel_size == 3
    assert "model.mlp_kernel_size=3" in plan.setting.method
    assert plan.upcycle_samples == 0
    assert planned(fitted(study() + convolved)).config.mlp_kernel_size == 0


def test_too_few_runs_are_refused():
    with pytest.raises(UserError, match="at least 4 models"):
        fitted(study(widths=(64,), lengths=(1e3,)))


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
