"""The launchers as users start them: the command of the mission, bad input, several nodes, SLURM, kills."""

import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_toys import (
    FOUR_RANKS,
    LAUNCHERS,
    MOE,
    ROOT,
    check_four_ranks,
    environment,
    launch,
    make_recipe,
    make_shards,
    records,
)

from dpt.data.codec import load_vae
from dpt.distributed import free_port
from dpt.training.checkpoint import find_checkpoints, newest_checkpoint
from tests.gloo import run_script

PRETRAIN = str(ROOT / "launchers" / "pretrain.py")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path / "run.json", [make_shards(tmp_path / "shards")])


def _plain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PRETRAIN, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )


def test_deepspeed_with_a_recipe_and_nothing_else(recipe: Path) -> None:
    done = launch("deepspeed", 1, PRETRAIN, "--ds_config", str(recipe), "--steps", "3", "--log_every", "2",
                  "--train_micro_batch_size_per_gpu", "3")  # fmt: skip
    run = recipe.with_suffix("")
    assert done.returncode == 0, done.stdout
    assert [record["step"] for record in records(run)] == [1, 2, 3]
    assert "Memory plan, GiB on each of 1 rank: weights 0.00, master weights 0.00, " in done.stdout
    assert (
        "Micro-batches of 2 instead of 3 (train_micro_batch_size_per_gpu, the most allowed): 8 samples on 1 rank" in done.stdout
    )
    assert "pretrain: class, 0.05M parameters" in done.stdout
    assert "step 3/3 | loss " in done.stdout
    assert f"Weights: {run / 'weights'}" in done.stdout
    noise = [line for line in done.stdout.splitlines() if "Warning" in line or "[Rank" in line or "MA 0." in line]
    assert noise == []


REFUSED = [
    (["--training.stepz", "3"], 'there is no field "training.stepz"; did you mean "steps"?'),
    (["--train_batch_size", "7", "--gradient_accumulation_steps", "2"], "train_batch_size 7 is not"),
    (["--data.shards", "/nowhere"], "/nowhere: there is no such shard folder"),
    (["--scheduler.type", "WarmupLR"], '"scheduler" is not used; set dpt.training.lr_schedule'),
    (["--optimizer.params.momentum", "0.9"], "optimizer.params.momentum is unknown"),
    (["--training.weights", "/nowhere.pt"], "/nowhere.pt: there is no such file"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_bad_input_is_one_sentence_and_exit_code_2(recipe: Path, change: list[str], words: str) -> None:
    """The launcher's own file, in a process forked from this one, which has loaded what takes longest. (DeepSpeed's search
    for libraries can speak there; the test below sees that it does not in a process of its own.)"""
    log = recipe.with_name("log")
    assert run_script(log, PRETRAIN, "--ds_config", str(recipe), *change, timeout_s=120) == 2, log.read_text()
    _check_refusal(log.read_text().splitlines()[-1], words, recipe)


def _check_refusal(error: str, words: str, recipe: Path) -> None:
    (line,) = error.strip().splitlines()
    assert line.startswith("pretrain: error: ")
    assert words in line
    assert not recipe.with_suffix("").exists()


def test_the_latest_refusal_is_one_sentence_in_a_process_of_its_own_too(recipe: Path) -> None:
    """After torch and all libraries were loaded, which then say nothing else."""
    change, words = REFUSED[-1]
    done = _plain("--ds_config", str(recipe), *change)
    assert done.returncode == 2, done.stderr
    _check_refusal(done.stderr, words, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", ["torchrun", "hostfile"])
def test_two_nodes_on_loopback(recipe: Path, tmp_path: Path, nodes: str) -> None:
    command = ["torchrun", "--nnodes", "2", "--nproc_per_node", "2"]
    if nodes == "hostfile":
        example = (ROOT / "launchers" / "hostfile.example").read_text()
        (tmp_path / "hostfile").write_text(example.replace("slots=8", "slots=2"))
        command = ["deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    script = [PRETRAIN, "--ds_config", str(recipe), *FOUR_RANKS]
    started = [
        subprocess.Popen([*command, "--node_rank", str(node), *script], env=environment(), cwd=ROOT) for node in range(2)
    ]
    assert [process.wait(900) for process in started] == [0, 0]
    check_four_ranks(recipe.with_suffix(""))


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_if_they_had_not_been(recipe: Path, tmp_path: Path) -> None:
    """kill -9 of all processes, 20 times, while a checkpoint is written at every step."""
    fields = ["--steps", "200", "--training.checkpoint_every", "1"]
    whole = launch("torchrun", 2, PRETRAIN, "--ds_config", str(recipe), *fields, "--output_dir", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stdout
    run = tmp_path / "killed"
    moments = random.Random(1)
    for _ in range(20):
        before = _newest_step(run)
        command = [*LAUNCHERS["torchrun"], "2", "--master_port", str(free_port()), PRETRAIN, "--ds_config", str(recipe)]
        process = subprocess.Popen([*command, *fields, "--output_dir", str(run)], cwd=ROOT, env=environment())
        deadline = time.monotonic() + 300
        while _newest_step(run) < before + 1 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.3))
        assert process.poll() is None, "the run ended before it could be killed"
        _kill_all(process)
        found = newest_checkpoint(run / "checkpoints")
        assert found is not None
        assert found[1]["step"] >= before
    done = launch("torchrun", 2, PRETRAIN, "--ds_config", str(recipe), *fields, "--output_dir", str(run))
    assert done.returncode == 0, done.stdout
    expected, weights = (load_file(folder / "weights" / "weights.safetensors") for folder in (tmp_path / "whole", run))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert [record["step"] for record in records(run)] == list(range(1, 201))


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of a launcher and all that it started."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for worker in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    psutil.wait_procs(started)


def _newest_step(run: Path) -> int:
    found = find_checkpoints(run / "checkpoints")
    return int(found[0].name.removeprefix("step_")) if found else 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "made no progress for 60 s")])
def test_a_rank_that_dies_or_hangs_stops_the_others_and_is_named(recipe: Path, number: signal.Signals, words: str) -> None:
    fields = ["--ds_config", str(recipe), "--steps", "1000000", "--training.timeout_s", "60"]
    command = [*LAUNCHERS["torchrun"], "2", "--master_port", str(free_port()), PRETRAIN, *fields]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    started = iter(process.stdout)
    assert any("step 1/1000000" in line for line in started)
    workers = psutil.Process(process.pid).children(recursive=True)
    victim = next(worker for worker in workers if worker.environ().get("RANK") == "1")
    victim.send_signal(number)
    begin = time.monotonic()
    assert any(f"rank 1 ({socket.gethostname()}) {words}" in line for line in started)
    assert time.monotonic() - begin < 60 + 20
    process.communicate(timeout=120)  # torchrun gives a stopped process half a minute to end by itself
    assert process.returncode == 1
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_checkpoints_but_not_the_run(recipe: Path) -> None:
    """Files over 400 kB cannot be written for a while: a checkpoint here has 1 MB."""
    run = recipe.with_suffix("")
    fields = ["--ds_config", str(recipe), "--training.checkpoint_every", "2"]
    assert _plain(*fields, "--steps", "4").returncode == 0
    limited = f"ulimit -f 400; exec {sys.executable} {PRETRAIN} {' '.join(fields)} --steps 8"
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout
    assert "The checkpoint of step 6 was not written: rank 0: File too large. It needs 0.001 GB in" in done.stdout
    assert "Training continues; the newest is still step_00000004." in done.stdout
    assert "step 8/8 | loss " in done.stdout
    assert "the last checkpoint could not be written; make room and start the same command again" in done.stdout
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    done = _plain(*fields, "--steps", "8")
    assert done.returncode == 0, done.stderr
    assert "Continuing from" in done.stdout
    assert "(step 4, written on 1 rank)" in done.stdout
    assert [record["step"] for record in records(run)] == list(range(1, 9))


@pytest.mark.slow
def test_records_and_pictures_reach_console_file_and_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.models import get_model_info

    recipe = make_recipe(tmp_path / "run.json", [make_shards(tmp_path / "shards", vae=load_vae().record)])
    tracking = {"tracking.enabled": "true", "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    tracking["tracking.registered_model"] = "tiny classes"
    fields = {**MOE, **tracking, "sampling.every": 2, "sampling.labels": "0,1,2,3,4"}
    options = [text for name, value in fields.items() for text in (f"--{name}", json.dumps(value).strip('"'))]
    done = launch("torchrun", 2, PRETRAIN, "--ds_config", str(recipe), "--steps", "5", *options)
    assert done.returncode == 0, done.stdout
    pieces = [
        r"step 5/5",
        "loss #",
        "balance #",
        "grad norm #",
        r"lr 3\.00e-03",
        "# samples/s",
        "#% of matrix peak",
        "data wait #%",
        "# GiB",
    ]
    line = r" \| ".join([*pieces, "expert load #-#", "expert distance #", "0:00:00 left"]).replace("#", r"[\d.e+-]+")
    assert re.search(line, done.stdout), done.stdout

    client = MlflowClient(tracking["tracking.uri"])
    (run,) = client.search_runs([client.get_experiment_by_name("dpt").experiment_id])
    lines = records(recipe.with_suffix(""))
    for name in ("loss", "load_balancing_loss", "grad_norm", "learning_rate", "samples_seen"):
        history = client.get_metric_history(run.info.run_id, f"train/{name}")
        assert [(m.step, m.value) for m in history] == [(record["step"], record[f"train/{name}"]) for record in lines]
    assert {
        "perf/samples_per_second",
        "perf/matrix_peak_share",
        "perf/data_wait",
        "perf/memory_gib",
        "experts/min_load",
        "experts/max_load",
    } < {*run.data.metrics}
    (version,) = client.search_model_versions("name = 'tiny classes'")
    assert (version.tags["dpt.stage"], version.tags["dpt.task"]) == ("pretrain", "class")
    assert Path(version.tags["dpt.folder"]) == recipe.with_suffix("") / "weights"
    assert get_model_info(version.source.removeprefix("file://")).signature.inputs.inputs[0].name == "label"
    distances = client.get_metric_history(run.info.run_id, "experts/distance")
    assert [m.step for m in distances] == [0, 5]  # of the weights that it starts from, and at the end
    assert distances[1].value == lines[-1]["experts/distance"]
    pictures = sorted(Path(file.path).name for file in client.list_artifacts(run.info.run_id, "pictures"))
    classes = [name for name in pictures if name.startswith("classes")]
    assert classes == [f"classes_{step:08d}.png" for step in (2, 4, 5)]
    with Image.open(recipe.with_suffix("") / "pictures" / classes[0]) as picture:
        assert picture.size == (4 * 32, 2 * 32)  # five of 32 px in rows of four


@pytest.mark.slow
def test_compiled_blocks_train_alike(recipe: Path, tmp_path: Path) -> None:
    fields = ["--ds_config", str(recipe), "--steps", "3", "--model.num_experts", "4", "--training.ep_size", "2"]
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        output = ["--training.compile", compiled, "--output_dir", str(tmp_path / name)]
        done = launch("torchrun", 2, PRETRAIN, *fields, *output)
        assert done.returncode == 0, done.stdout
    losses = [[record["train/loss"] for record in records(tmp_path / name)] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert json.loads((tmp_path / "compiled" / "weights" / "config.json").read_text())["model"]["num_experts"] == 4
