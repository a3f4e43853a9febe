"""Runs end to end: a training process, its sender, an SQLite store; kills, resumes, and a real server that goes away."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dpt import cli
from dpt.config.sections import TrackingConfig
from dpt.distributed import free_port
from dpt.errors import UserError
from dpt.tracking import start_run
from dpt.tracking.read import ancestors, load_runs, with_ancestors
from dpt.tracking.sender import sync
from dpt.tracking.spool import Spool
from tests.tracking.server import serve, stop, wait_for

RECIPE = {"train_batch_size": 8, "dpt": {"task": "depth", "model": {"preset": "a1"}, "evaluation": {"steps": [1, 5]}}}


def begin(uri, output_dir, *, offline=False, **options):
    values = {"stage": "pretrain", "name": "pretrain a1", "params": RECIPE, "parents": [], "tags": {"dpt.label": "x"}}
    config = TrackingConfig(uri=uri, experiment="t", offline=offline)
    return start_run(config, output_dir=output_dir, **(values | options))


def test_no_record_when_off_or_on_other_ranks(tmp_path, monkeypatch):
    options = {"stage": "s", "name": "n", "params": {}, "parents": [], "output_dir": tmp_path / "o", "tags": {}}
    assert start_run(TrackingConfig(enabled=False), **options).run_id == ""
    monkeypatch.setenv("RANK", "1")
    with start_run(TrackingConfig(), **options) as run:
        run.log_metrics({"a": 1.0}, 1)
    assert run.run_id == ""
    assert not (tmp_path / "o").exists()


def test_offline_nothing_is_sent_before_sync(tmp_path, uri, capsys):
    with begin(uri, tmp_path / "o", offline=True) as run:
        run.log_metrics({"train/loss": 1.0}, 1)
        (tmp_path / "gone").mkdir()
        run.log_artifact(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
    assert load_runs(uri) == []
    assert cli.main(["sync", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().out.endswith("all is sent, but for 1 that MLflow refused for good\n")
    (found,) = load_runs(uri, "t")
    assert (found.run_id, found.metrics["train/loss"], found.status) == (run.run_id, 1.0, "FINISHED")


@pytest.mark.parametrize("uri", ["file:///x", "mlruns"])
def test_a_store_that_mlflow_cannot_write_is_refused(tmp_path, uri):
    with pytest.raises(UserError, match=r"dpt\.tracking\.uri"):
        begin(uri, tmp_path)


def test_a_run_its_resumption_and_its_child_are_read_back(tmp_path, uri, without_process):
    picture = tmp_path / "p.png"
    picture.write_bytes(b"png")
    first = begin(uri, tmp_path / "o")
    for step in range(1, 6):
        first.log_metrics({"train/loss": 1 / step, "odd name!": 1.0}, step)
    first.log_picture(picture, "sample", 5)
    first.finish()
    assert load_runs(uri) == []
    assert [left for _, left in sync(tmp_path)] == [""]
    # the checkpoint was of step 3; steps 4 and 5 are already recorded
    second = begin(uri, tmp_path / "o", resume_run_id=first.run_id, past_step=3)
    for step in range(4, 8):
        second.log_metrics({"train/loss": 1 / step}, step)
    second.log_artifact(picture, "extra")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text(json.dumps({"task": "depth", "model": {"preset": "a1"}}))
    second.register_model(weights, "depth a1", tags={"stage": "pretrain", "abs_rel": "0.1"})
    with begin(uri, tmp_path / "e", stage="evaluate", name="evaluate", parents=[first.run_id]) as child:
        child.log_metrics({"eval/depth/abs_rel": 0.1}, 0)
    second.finish()
    assert [left for _, left in sync(tmp_path)] == ["", ""]

    from mlflow.models import get_model_info

    runs = load_runs(uri, "t")
    parent, evaluation = runs
    assert parent.run_id == second.run_id == first.run_id
    assert parent.history("train/loss") == [(s, pytest.approx(1 / s)) for s in range(1, 8)]
    assert "odd name_" in parent.metrics
    assert parent.status == "FINISHED"
    assert parent.params["model.preset"] == "a1"
    assert parent.params["evaluation.steps"] == "[1, 5]"
    assert parent.params["train_batch_size"] == "8"
    assert parent.recipe() == RECIPE
    assert parent.artifacts() == ["extra/p.png", "model/MLmodel", "pictures/sample_00000005.png", "recipe.json"]
    (version,) = parent.client.search_model_versions("name = 'depth a1'")
    assert version.tags == {"stage": "pretrain", "abs_rel": "0.1", "dpt.folder": str(weights)}
    assert get_model_info(version.source.removeprefix("file://")).signature.outputs.inputs[0].name == "depth"
    assert parent.artifacts("pictures") == ["pictures/sample_00000005.png"]
    assert (tmp_path / "mlruns" / "t").is_dir()
    assert evaluation.tags["mlflow.parentRunId"] == parent.mlflow_run_id
    assert ancestors(evaluation, runs) == [parent]
    assert with_ancestors([evaluation], uri) == [parent, evaluation]
    assert load_runs(uri, run_ids=[parent.run_id[:8]]) == [parent]
    assert load_runs(uri, filter="metrics.`eval/depth/abs_rel` < 0.2") == [evaluation]
    with pytest.raises(UserError, match=r"--filter 'metrics < < 1': MLflow does not understand it"):
        load_runs(uri, filter="metrics < < 1")
    with pytest.raises(UserError, match="no run with this id"):
        load_runs(uri, run_ids=["nothing"])
    with pytest.raises(UserError, match="no such experiment"):
        load_runs(uri, "other")


TRAINING = """
import sys, time
from pathlib import Path
from dpt.config.sections import TrackingConfig
from dpt.tracking import start_run
run = start_run(TrackingConfig(uri=sys.argv[1], experiment="t"), stage="pretrain", name="n", params={}, parents=[],
                output_dir=Path(sys.argv[2]), tags={})
assert "mlflow" not in sys.modules and "torch" not in sys.modules
for step in range(200):
    run.log_metrics({"train/loss": float(step)}, step)
print(run.run_id, flush=True)
time.sleep(60)
"""


def test_a_killed_run_is_sent_and_marked_failed(tmp_path, uri):
    process = subprocess.Popen([sys.executable, "-c", TRAINING, uri, str(tmp_path / "o")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run = wait_for(lambda: next((r for r in load_runs(uri) if r.run_id == run_id and r.status == "FAILED"), None), 180)
    assert len(run.history("train/loss")) == 200


def test_an_exception_marks_the_run_and_sync_sends_to_another_store(tmp_path, uri):
    run = begin(uri, tmp_path / "o")
    run.log_metrics({"a": 1.0}, 1)
    with pytest.raises(RuntimeError, match="x"), run:
        raise RuntimeError("x")
    assert [r.status for r in load_runs(uri, "t")] == ["FAILED"]
    shutil.copyfile(tmp_path / "mlflow.db", tmp_path / "other.db")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    ((_, left),) = sync(tmp_path, uri=other)
    assert left == f"it was sent to {uri}; --again sends it to {other}, too"
    ((spool, left),) = sync(tmp_path, uri=other, again=True)
    assert (spool.run_id, left) == (run.run_id, "")
    (record,) = load_runs(other, "t")
    assert record.history("a") == [(1, 1.0)]  # sent a second time, stored once


@pytest.mark.slow
def test_a_server_that_is_down_at_start_middle_and_end(tmp_path, empty_store):
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    run = begin(uri, tmp_path / "o")  # down at the start
    for step in range(100):
        run.log_metrics({"train/loss": float(step)}, step)
    spool = Spool(tmp_path / "o" / "tracking", run.run_id)
    wait_for(lambda: spool.state.error)
    server = serve(port, tmp_path)
    wait_for(lambda: spool.unsent == 0, 120)
    stop(server)  # down in the middle
    for step in range(100, 200):
        run.log_metrics({"train/loss": float(step)}, step)
    wait_for(lambda: spool.state.error)
    server = serve(port, tmp_path)
    wait_for(lambda: spool.unsent == 0, 120)
    for step in range(200, 300):
        run.log_metrics({"train/loss": float(step)}, step)
    stop(server)  # down at the end
    begun = time.monotonic()
    run.finish()
    assert time.monotonic() - begun < 65
    assert spool.unsent > 0
    server = serve(port, tmp_path)
    try:
        ((_, left),) = sync(tmp_path / "o")
        assert left == ""
        (record,) = load_runs(uri, "t")
        assert record.status == "FINISHED"
        assert record.history("train/loss") == [(s, float(s)) for s in range(300)]
        assert len(record.client.get_metric_history(record.mlflow_run_id, "train/loss")) == 300
        assert record.recipe() == RECIPE
    finally:
        stop(server)
