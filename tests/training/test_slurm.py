"""How a job of launchers/slurm.sh ends: each stage finished, stopped to be queued again, or failed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_toys import ROOT, environment, make_recipe

TRAINING = ["pretrain", "finetune", "upcycle"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path / "run.json", [tmp_path / "shards"])  # of 20 steps


def _export(recipe: Path, step: int) -> None:
    weights = recipe.with_suffix("") / "weights"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text(json.dumps({"lineage": {"step": step}}))


def _run_job(recipe: Path, stage: str, *, srun: int, fields: tuple[str, ...] = ()) -> tuple[int, str]:
    """The job's exit code and what scontrol was asked for, where srun returns `srun`."""
    tools, log = recipe.parent / "bin", recipe.parent / "log"
    tools.mkdir()
    asked = f'echo "$@" >> {log}\n'
    (tools / "srun").write_text(f"#!/bin/sh\n{asked}exit {srun}\n")
    (tools / "scontrol").write_text(f"#!/bin/sh\n[ $1 = show ] && echo node1 || {asked}")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    variables = environment() | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "DPT_PYTHON": sys.executable,
    }
    command = ["bash", str(ROOT / "launchers" / "slurm.sh"), stage, str(recipe), *fields]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    started, *requeued = log.read_text().splitlines()
    assert started.endswith(" ".join([f"launchers/{stage}.py --ds_config {recipe}", *fields]))
    return done.returncode, "\n".join(requeued)


@pytest.mark.parametrize("stage", TRAINING)
def test_training_is_finished_when_its_last_weights_are_exported(recipe: Path, stage: str) -> None:
    _export(recipe, 20)
    assert _run_job(recipe, stage, srun=0) == (0, "")


@pytest.mark.parametrize("stage", TRAINING)
def test_training_that_saved_and_left_is_queued_again(recipe: Path, stage: str) -> None:
    assert _run_job(recipe, stage, srun=0) == (0, "requeue 12345")


def test_the_end_of_a_job_is_found_without_torch() -> None:
    """Which takes seconds to load."""
    code = "import sys, dpt.config.command, dpt.training.outputs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


def test_weights_of_a_shorter_run_do_not_end_a_longer_one(recipe: Path) -> None:
    _export(recipe, 20)
    assert _run_job(recipe, "pretrain", srun=0, fields=("--steps", "40")) == (0, "requeue 12345")


def test_an_evaluation_is_finished_when_it_ends(recipe: Path) -> None:
    assert _run_job(recipe, "evaluate", srun=0) == (0, "")


@pytest.mark.parametrize("stage", [*TRAINING, "evaluate"])
@pytest.mark.parametrize("signal", [10, 15])
def test_a_stage_that_the_signal_ended_is_queued_again(recipe: Path, stage: str, signal: int) -> None:
    """As USR1 and SIGTERM end an evaluation at any time, and training while it starts."""
    assert _run_job(recipe, stage, srun=128 + signal) == (0, "requeue 12345")


@pytest.mark.parametrize("stage", [*TRAINING, "evaluate"])
@pytest.mark.parametrize("code", [1, 2, 128 + 9])
def test_a_failure_is_not_repeated(recipe: Path, stage: str, code: int) -> None:
    assert _run_job(recipe, stage, srun=code) == (code, "")
