"""How a job of launchers/slurm.sh ends: each stage finished, stopped to be queued again, or failed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_toys import FOUR_RANKS, ROOT, check_four_ranks, environment, make_recipe, make_shards

SCRIPT = ["bash", str(ROOT / "launchers" / "slurm.sh")]
TRAINING = ["pretrain", "finetune", "upcycle"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path / "run.json", [tmp_path / "shards"])  # of 20 steps


def _export(recipe: Path, step: int) -> None:
    weights = recipe.with_suffix("") / "weights"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text(json.dumps({"lineage": {"step": step}}))


def _variables(tools: Path) -> dict[str, str]:
    """Of a job for which srun and scontrol are those in `tools`."""
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return environment() | {
        "PATH": f"{tools}{os.pathsep}{environment()['PATH']}",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "DPT_PYTHON": sys.executable,
    }


def _run_job(recipe: Path, stage: str, *, srun: int, fields: tuple[str, ...] = ()) -> tuple[int, str]:
    """The job's exit code and what scontrol was asked for, where srun returns `srun`."""
    tools, log = recipe.parent / "bin", recipe.parent / "log"
    tools.mkdir()
    asked = f'echo "$@" >> {log}\n'
    (tools / "srun").write_text(f"#!/bin/sh\n{asked}exit {srun}\n")
    (tools / "scontrol").write_text(f"#!/bin/sh\n[ $1 = show ] && echo node1 || {asked}")
    command = [*SCRIPT, stage, str(recipe), *fields]
    done = subprocess.run(command, env=_variables(tools), capture_output=True, text=True, timeout=120)
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


SRUN = """
import os, signal, subprocess, sys, time
tasks, nodes = 4, 2
command = [argument for argument in sys.argv[1:] if not argument.startswith("--kill-on-bad-exit")]
each = tasks // nodes
started = []
for task in range(tasks):
    step = {"SLURM_PROCID": task, "SLURM_LOCALID": task % each, "SLURM_STEP_NUM_TASKS": tasks}
    step["SLURM_STEP_TASKS_PER_NODE"] = f"{each}(x{nodes})"
    started.append(subprocess.Popen(command, env=os.environ | {name: str(value) for name, value in step.items()}))
if "FAKE_USR1_AFTER" in os.environ:
    output = os.path.splitext(command[command.index("--ds_config") + 1])[0]
    while not os.path.exists(os.path.join(output, "records.jsonl")):
        time.sleep(0.02)
    started[-1].send_signal(signal.SIGUSR1)
sys.exit(max(process.wait() for process in started))
"""
"""Tasks on "nodes" that are all this machine."""


@pytest.mark.slow
def test_a_job_on_two_nodes_that_is_asked_to_stop_is_queued_again_and_then_finishes(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run.json", [make_shards(tmp_path / "shards")])
    tools, log = tmp_path / "bin", tmp_path / "log"
    tools.mkdir()
    (tools / "srun").write_text(f"#!{sys.executable}{SRUN}")
    (tools / "scontrol").write_text(f'#!/bin/sh\n[ $1 = show ] && echo 127.0.0.1 || echo "$@" >> {log}\n')
    command, variables = [*SCRIPT, "pretrain", str(recipe), *FOUR_RANKS], _variables(tools)
    first = [*command, "--training.checkpoint_every", "1"]
    assert subprocess.run(first, env=variables | {"FAKE_USR1_AFTER": "1"}, timeout=900).returncode == 0
    assert log.read_text() == "requeue 12345\n"
    assert subprocess.run(command, env=variables, timeout=900).returncode == 0
    assert log.read_text() == "requeue 12345\n"
    check_four_ranks(recipe.with_suffix(""))
