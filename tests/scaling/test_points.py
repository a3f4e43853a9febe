"""Points out of runs, and the laws command on them."""

import json

import pytest
from made_runs import made_run

from dpt import cli
from dpt.commands import laws
from dpt.errors import UserError
from dpt.scaling.points import collect, final_value


def study():
    """Three sizes, each pre-trained and fine-tuned, evaluated with two settings; AbsRel = 3 (MACs)^-0.1 for 10 steps."""
    runs = []
    for number, macs in enumerate((1e12, 1e13, 1e14)):
        params = {"model.preset": f"a{number + 1}", "training.steps": "100"}
        half = {"compute/train_macs": macs / 2, "train/loss": 1.0, "train/samples_seen": 3200.0}
        histories = {
            "train/loss": [(s, 5 * (macs * s / 100) ** -0.05) for s in (1, 50, 100)],
            "compute/train_macs": [(s, macs / 2 * s / 100) for s in (1, 50, 100)],
        }
        base, tuned = f"base{number}", f"tuned{number}"
        runs.append(made_run(base, params=params, metrics=half, histories=histories))
        runs.append(made_run(tuned, stage="finetune", parents=[base], params=params, metrics=half, histories=histories))
        error = 3 * macs**-0.1
        metrics = {"eval/depth/abs_rel": error, "eval/depth/abs_rel/s1_n1": 2 * error, "eval/depth/abs_rel/s10_n1": error}
        metrics |= {"eval/depth/delta1": 1 - error, "eval/depth/delta1/s10_n1": 1 - error, "compute/forward_macs": 1e9}
        params = {"model.preset": "wrong", "evaluation.eta": "0.5"}
        runs.append(made_run(f"e{number}", stage="evaluate", parents=[tuned], metrics=metrics, params=params))
    return runs


def test_evaluations_stand_over_the_compute_of_their_whole_descent():
    runs = study()
    points = collect(runs, runs, "macs", "eval/depth/abs_rel", group_by="model.preset")
    assert [p.x for p in points] == [1e12, 1e13, 1e14]
    assert [p.y for p in points] == pytest.approx([3 * x**-0.1 for x in (1e12, 1e13, 1e14)])
    assert [p.group for p in points] == ["a1", "a2", "a3"]
    points = collect(runs, runs, "macs", "eval/depth/abs_rel", group_by="stage,model.preset")
    assert points[0].group == "evaluate a1"
    assert [p.x for p in collect(runs, runs, "own_macs", "eval/depth/abs_rel")] == [5e11, 5e12, 5e13]


def test_test_time_quantities_give_a_point_for_every_setting():
    runs = study()
    points = collect(runs, runs, "test_macs", "eval/depth/abs_rel")
    assert [p.x for p in points] == [1e9, 1e10] * 3
    assert [p.x for p in collect(runs, runs, "steps", "eval/depth/abs_rel", ensemble=1)] == [1, 10] * 3
    assert next(p.y for p in collect(runs, runs, "macs", "eval/depth/abs_rel", steps=1)) == pytest.approx(6 * 1e12**-0.1)


def test_complements_parameters_samples_and_fields():
    runs = study()
    assert collect(runs, runs, "macs", "1-eval/depth/delta1")[0].y == pytest.approx(3 * 1e12**-0.1)
    assert collect(runs, runs, "params", "eval/depth/abs_rel")[0].x > 1e6
    assert collect(runs, runs, "samples", "train/loss")[0].x == 3200
    assert collect(runs, runs, "training.steps", "eval/depth/abs_rel")[0].x == 100
    assert collect(runs, runs, "evaluation.eta", "eval/depth/abs_rel")[0].x == 0.5


def test_curves_run_over_all_compute_up_to_each_step():
    runs = study()
    points = collect(runs[:2], runs, "macs", "train/loss", curve=True, group_by="name")
    assert [p.x for p in points] == pytest.approx([5e9, 2.5e11, 5e11, 5.05e11, 7.5e11, 1e12])
    with pytest.raises(UserError, match="a curve runs over"):
        collect(runs, runs, "params", "train/loss", curve=True)


def test_a_noisy_end_is_averaged_and_nothing_found_is_said():
    assert final_value([(s, float(s % 2)) for s in range(100)]) == pytest.approx(0.6)
    with pytest.raises(UserError, match="no run has both"):
        collect(study(), study(), "macs", "eval/flow/epe")


def test_the_command_prints_draws_and_refuses(monkeypatch, capsys, tmp_path):
    runs = study()
    monkeypatch.setattr(laws, "selected_runs", lambda arguments: (runs, runs))
    out = tmp_path / "law.svg"
    assert cli.main(["laws", "--y", "eval/depth/abs_rel", "--out", str(out)]) == 0
    assert "eval/depth/abs_rel(macs) = 3 × macs^-0.1;" in capsys.readouterr().out
    assert "3 × C" in out.read_text()
    assert cli.main(["laws", "--y", "train/loss", "--curve", "--frontier", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["points"]) == 18
    assert content["laws"][""]["b"] < 0
    with pytest.raises(SystemExit) as exit_:
        cli.main(["laws", "--y", "eval/depth/abs_rel", "--group-by", "model.preset"])
    assert exit_.value.code == 2
    assert "a1: 1 different x cannot carry" in capsys.readouterr().err
