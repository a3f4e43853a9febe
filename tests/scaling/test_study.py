"""Studies: unfolded, checked before anything starts, restartable, submitted with dependencies, and drawn."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from dpt.errors import UserError
from dpt.scaling.launching import pending, submit
from dpt.scaling.running import run_here
from dpt.scaling.study import expected_macs

ROOT = Path(__file__).resolve().parents[2]


def test_an_evaluation_takes_all_fields_of_its_own_stage(write_study):
    """Of axes only those of `evaluation`, as in the next test: the others are for the trainings that share the axes."""
    study = write_study("{evaluation.steps: [1, 2]}", "{evaluation.steps: [1, 2], data.vae: my_vae}")
    assert {launch.resolved.dpt.data.vae for launch in study.of_stages(["evaluate"])} == {"my_vae"}
    assert "my_vae" not in {launch.resolved.dpt.data.vae for launch in study.of_stages(["depth"])}


def test_the_grid_unfolds_in_order_with_weights_and_names(write_study):
    study = write_study()
    names = [launch.name for launch in study.launches]
    assert names[:4] == ["pretrain_w64", "pretrain_w96", "depth_w64_short", "depth_w64_long"]
    assert len(names) == 2 + 4 + 4
    depth = study.launches[3]
    assert depth.parent == "pretrain_w64"
    assert depth.fields["training.weights"] == str(study.output / "pretrain_w64" / "weights")
    assert depth.fields["training.steps"] == 50
    assert study.launches[0].fields["training.steps"] == 7
    evaluation = study.launches[-1]
    assert evaluation.fields["evaluation.weights"] == str(study.output / "depth_w96_long" / "weights")
    assert not any(name.startswith(("model.", "training.")) for name in evaluation.fields)
    tags = {"dpt.label": "w96 long", "study.stage": "evaluate", "study.size": "w96", "study.length": "long"}
    assert evaluation.resolved.dpt.tracking.tags == tags
    assert evaluation.resolved.dpt.evaluation.steps == [1, 2]
    assert [launch.stage for launch in study.of_stages(["depth"])] == ["depth"] * 4


def test_the_command_line_resolves_to_the_same_recipe(write_study):
    from dpt.config.command import parse_command

    for launch in write_study().launches:
        section = "evaluation" if launch.launcher == "evaluate" else "training"
        parsed = parse_command(launch.launcher, "", section, launch.arguments())
        assert parsed.to_dict() == launch.resolved.to_dict()


def test_expected_compute_is_that_of_the_cost_model(write_study):
    from dpt.models.costs import macs

    study = write_study()
    launch, evaluation = study.launches[0], study.launches[-1]
    assert expected_macs(study, launch) == macs(launch.resolved.dpt.model).training * 7 * 2
    parent = next(other for other in study.launches if other.name == evaluation.parent)
    assert expected_macs(study, evaluation) == macs(parent.resolved.dpt.model).forward * 3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("axes: [size, length], weights: pretrain", "axes: [length], weights: pretrain", "must hold all axes of pretrain"),
        ("weights: depth", "weights: nothing", 'no earlier stage "nothing"'),
        ("axes: [size]\n", "axes: [sise]\n", 'no axis "sise"'),
        ("launcher: evaluate", "launcher: walk", "launcher"),
        ("figures:", "figurs:", 'no key "figurs"'),
        ("x: macs", "z: macs", "figures"),
        ("    w96: {model.hidden_size: 96}", "    w96: 5", "axes.size must map"),
        ("title: Size and length", "title: [", "cannot be read"),
    ],
)
def test_a_wrong_study_is_one_sentence(write_study, old, new, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        write_study(old, new)


def test_a_wrong_field_or_a_missing_need_stops_before_any_launch(write_study):
    with pytest.raises(UserError, match=r"hidden_sise"):
        pending(write_study("model.hidden_size: 96", "model.hidden_sise: 96"))
    needy = write_study("figures:", "needs: [nowhere]\nfigures:")
    assert len(pending(needy)) == 10
    with pytest.raises(UserError, match=r"1 things must be made first:\n  nowhere: "):
        run_here([needy], say=lambda text: None)


@pytest.fixture
def slurm_calls(monkeypatch, tmp_path):
    """Fake sbatch, whose calls go to the file, and squeue."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nwc -l < {tmp_path}/calls\n')
    (tools / "squeue").write_text("#!/bin/sh\necho RUNNING\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "calls"


def test_slurm_jobs_wait_for_their_parents_and_are_not_submitted_twice(write_study, slurm_calls):
    study = write_study(uri="http://node1:5000")
    study.output.mkdir(parents=True)
    (study.output / "jobs.json").write_text("{}")
    (study.output / "kept").hardlink_to(study.output / "jobs.json")
    submit([study], ["--gpus", "8"], script="launchers/slurm.sh", say=lambda text: None)
    assert (study.output / "kept").read_text() == "{}"  # replaced as a whole: a kill leaves no torn file
    calls = slurm_calls.read_text().splitlines()
    assert len(calls) == 10
    assert "--dependency" not in calls[0]
    assert "--dependency=afterok:1 --gpus 8 launchers/slurm.sh finetune " in calls[2]
    assert calls[0].split("slurm.sh ")[1].startswith(f"pretrain {ROOT / 'ds_configs' / 'dense_a1.json'} --training.steps 7")
    submit([study], [], script="launchers/slurm.sh", say=lambda text: None)
    assert len(slurm_calls.read_text().splitlines()) == 10
    assert len(json.loads((study.output / "jobs.json").read_text())) == 10


def test_slurm_jobs_do_not_share_an_sqlite_file(write_study, slurm_calls):
    served, local = write_study(uri="http://node1:5000"), write_study()
    with pytest.raises(UserError, match=r'cannot share "sqlite:///x.db".* --uri http://NODE:5000') as refused:
        submit([served, local], [], script="launchers/slurm.sh", say=lambda text: None)
    assert "\n" not in str(refused.value)
    assert not slurm_calls.exists()
    assert not local.output.exists()
    silent = write_study("training.steps: 7,", "training.steps: 7, tracking.enabled: false,")
    pretraining = [dataclasses.replace(silent, launches=silent.launches[:2])]
    submit(pretraining, [], script="launchers/slurm.sh", say=lambda text: None)  # records nothing
    assert len(slurm_calls.read_text().splitlines()) == 2


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "studies").glob("*.yaml")))
def test_shipped_studies_are_valid(name, shipped):
    study = shipped(name)
    for launch in study.launches:
        recipe = launch.resolved
        assert expected_macs(study, launch) > 0 or recipe.dpt.training.steps == 0
        assert recipe.dpt.tracking.experiment == study.experiment
    stages = {launch.stage for launch in study.launches}
    assert study.figures
    assert all(set(figure.stages) <= stages for figure in study.figures)


def test_a_kept_checkpoint_gives_the_weights(write_study):
    study = write_study("short: {training.steps: 5}", "short: {training.steps: 5, weights.step: 3}")
    launch = next(launch for launch in study.launches if launch.name == "depth_w64_short")
    assert launch.fields["training.weights"] == str(study.output / "pretrain_w64" / "checkpoints" / "step_00000003")
    assert launch.fields["tracking.tags"]["study.weights_step"] == "3"
    with pytest.raises(UserError, match=r"launcher finetune with training\.steps 0"):
        write_study("stages: [depth]\n    values:\n      short: {training.steps: 5}", "values:\n      short: {weights.step: 3}")


def test_all_that_a_study_reads_is_looked_for_with_its_command(shipped, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = shipped("paper_tables.yaml")
    folders = [f for launch in study.launches if launch.launcher == "evaluate" for f in launch.fields["evaluation.data"]]
    assert set(folders) <= set(study.needs)
    with pytest.raises(UserError) as refused:
        run_here([study], say=lambda text: None)
    lines = str(refused.value).splitlines()
    assert len(lines) == 1 + len(study.needs)
    assert all("python -m data_tools.encode" in line for line in lines if "data/shards/" in line)
