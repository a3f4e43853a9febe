"""Rows of results, their text and the lineage."""

import pytest
from made_runs import made_run

from dpt.scaling.compute import model_config, total_train_macs
from dpt.scaling.lineage import lineage_svg, places
from dpt.scaling.results import evaluation_rows, format_table, results_table, show_macs


def evaluation(run_id="e", label="ours", start=1.0, **metrics):
    return made_run(run_id, stage="evaluate", tags={"dpt.label": label}, start_time=start, metrics=metrics)


def test_every_setting_is_a_row_below_the_best_constant():
    run = evaluation(**{
        "eval/depth/abs_rel": 0.1, "eval/depth/abs_rel/s10_n1": 0.12, "eval/depth/abs_rel/s10_n5": 0.1,
        "eval/depth/delta1/s10_n5": 0.9, "eval/depth/baseline_abs_rel": 0.4, "compute/forward_macs": 2e8, "perf/x": 1.0,
        "eval/depth/ceiling_abs_rel": 0.01, "eval/depth/num_samples": 7.0,
    })  # fmt: skip
    base, ceiling, one, five = results_table([run])
    assert (base.label, base.metrics) == ("best constant", {"abs_rel": 0.4})
    assert (ceiling.label, ceiling.metrics) == ("truth through the VAE", {"abs_rel": 0.01})
    assert five.num_samples == 7
    assert (one.steps, one.ensemble, one.metrics) == (10, 1, {"abs_rel": 0.12})
    assert five.metrics == {"abs_rel": 0.1, "delta1": 0.9}
    assert five.share("abs_rel") == pytest.approx(0.25)
    assert five.macs == 2e8 * 10 * 5
    text = format_table([base, one, five])
    assert "10.00" in text
    assert "0.25" in text
    assert text.splitlines()[0] == "depth"


def test_the_truth_through_each_vae_is_a_reference_of_its_own():
    errors = {"eval/depth/abs_rel/s1_n1": 0.1, "eval/depth/baseline_abs_rel": 0.4}
    runs = [
        made_run(
            vae + label, stage="evaluate", start_time=start, params={"data.vae": "of the recipe"},
            tags={"dpt.label": label, "dpt.vae": vae}, metrics=errors | {"eval/depth/ceiling_abs_rel": ceiling},
        )
        for start, (label, vae, ceiling) in enumerate(
            [("a", "one", 0.02), ("b", "one", 0.02), ("c", "other", 0.01), ("d", "hub:other", 0.01)]
        )
    ]  # fmt: skip
    labels = [row.label for row in results_table(runs)]
    assert labels == ["best constant", "truth through the VAE, one", "truth through the VAE, hub:other", *"abcd"]
    assert [row.label for row in results_table(runs[:2])] == ["best constant", "truth through the VAE", "a", "b"]


def test_flow_counts_its_two_passes_and_single_settings_come_from_the_recipe():
    run = made_run(
        stage="evaluate",
        params={"evaluation.steps": "[4]", "evaluation.ensemble": "[3]"},
        metrics={"eval/flow/flying_chairs/epe": 3.0, "compute/forward_macs": 1e9},
    )
    (row,) = results_table([run])
    assert (row.dataset, row.steps, row.ensemble, row.macs) == ("flying_chairs", 4, 3, 2 * 4 * 3 * 1e9)


def test_generated_images_are_rows_like_any_other():
    metrics = {"fid": 2.271, "sfid": 4.6, "inception_score": 278.2, "precision": 0.83, "recall": 0.57}
    run = made_run(
        stage="evaluate",
        params={"evaluation.steps": "[250]", "evaluation.ensemble": "[1]"},
        tags={"dpt.dataset": "imagenet256.npz"},
        metrics={f"eval/class/{name}": value for name, value in (metrics | {"macs": 6e13, "num_samples": 5e4}).items()},
    )
    (row,) = results_table([run])
    assert (row.dataset, row.steps, row.macs, row.num_samples) == ("imagenet256.npz", 250, 6e13, 50_000)
    text = format_table([row])
    assert "FID ↓" in text
    assert "2.27" in text
    assert "278.2" in text


def test_of_runs_with_one_label_the_newest_counts():
    rows = results_table([
        evaluation("new", start=2.0, **{"eval/depth/abs_rel/s1_n1": 0.2}),
        evaluation("old", start=1.0, **{"eval/depth/abs_rel/s1_n1": 0.3}),
        evaluation("other", "theirs", start=1.5, **{"eval/depth/abs_rel/s1_n1": 0.4}),
    ])  # fmt: skip
    assert [(r.label, r.metrics["abs_rel"]) for r in rows] == [("theirs", 0.4), ("ours", 0.2)]


def test_no_evaluation_is_said():
    assert format_table(results_table([made_run()])) == "(no evaluation has been recorded)"


@pytest.mark.parametrize(("macs", "text"), [(None, "–"), (1.234e12, "1.23 T"), (5e15, "5 P"), (2e6, "2 M"), (12.0, "12")])
def test_macs_are_readable(macs, text):
    assert show_macs(macs) == text


def family():
    macs = {"compute/train_macs": 1e12}
    return [
        made_run("base", metrics=macs),
        made_run("tuned", stage="finetune", parents=["base"], metrics=macs),
        made_run("scratch", stage="finetune", metrics=macs),
        made_run("moe <b>", stage="upcycle", parents=["tuned"], metrics=macs),
        made_run("tuned2", stage="finetune", parents=["base", "gone"], metrics=macs),
    ]


def test_descent_is_drawn_and_its_compute_added_up():
    runs = family()
    assert places(runs) == {"base": (0, 0), "tuned": (1, 0), "moe <b>": (2, 0), "tuned2": (1, 1), "scratch": (0, 2)}
    assert [total_train_macs(r, runs) for r in runs] == [1e12, 2e12, 1e12, 3e12, 2e12]
    svg = lineage_svg(runs, {"tuned": "depth 1 & 2"})
    assert svg.count("<path") == 3
    assert "moe &lt;b&gt;" in svg
    assert "depth 1 &amp; 2" in svg


def test_a_circle_of_parents_does_not_hang():
    runs = [made_run("a", parents=["b"]), made_run("b", parents=["a"])]
    assert lineage_svg(runs, {}).startswith("<svg")
    assert total_train_macs(runs[0], runs) == 0


def test_the_architecture_is_read_back_from_the_flat_parameters():
    params = {"model.preset": "a1", "model.hidden_size": "96", "model.qk_norm": "true", "upcycling.num_experts": "4"}
    dense = model_config(made_run(params=params))
    assert (dense.preset, dense.hidden_size, dense.qk_norm, dense.num_experts) == ("a1", 96, True, 0)
    assert model_config(made_run(stage="upcycle", params=params)).num_experts == 4
    assert model_config(made_run()) is None
    assert model_config(made_run(params={"model.num_heads": "5"})) is None


def test_guidance_doubles_a_prediction():
    metrics = {"eval/depth/abs_rel/s10_n2": 0.1, "compute/forward_macs": 1e9}
    (row,) = results_table([made_run(stage="evaluate", metrics=metrics, params={"evaluation.guidance_scale": "2.0"})])
    assert row.macs == 4e10


def test_compute_is_that_of_the_images_where_it_was_recorded():
    """A 4:3 image 640 wide has 1,200 tokens, not the 1,024 of the network's own size: what the evaluator counted stands."""
    from dpt.evaluation.summary import tracked_metrics

    result = {"steps": 2, "ensemble": 1, "metrics": {"abs_rel": 0.1}, "macs_per_prediction": 2400.0}
    one = {"task": "depth", "results": [result], "baseline": None, "ceiling": None, "code": None, "num_samples": 3}
    metrics = tracked_metrics({"sets": {"nyu_test": one}, "settings": {"forward_macs": 1024.0}})
    (row,) = evaluation_rows(made_run("e", stage="evaluate", metrics=metrics))
    assert row.macs == 2400.0
    assert row.metrics == {"abs_rel": 0.1}
