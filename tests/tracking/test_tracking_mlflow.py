"""What MLflow shows of runs: system metrics, data sets, nesting, links; and servers that ask for a password."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from dpt.config.sections import TrackingConfig
from dpt.errors import UserError
from dpt.tracking import start_run, watch_node
from dpt.tracking.delivery import Sender
from dpt.tracking.read import load_runs, run_url
from dpt.tracking.sender import sync
from dpt.tracking.spool import Spool
from dpt.tracking.store import write_model_card
from dpt.tracking.system import SystemRecords


def begin(uri, output_dir, *, experiment="t", **options):
    values = {"stage": "pretrain", "name": "n", "params": {}, "parents": [], "tags": {}}
    return start_run(TrackingConfig(uri=uri, experiment=experiment), output_dir=output_dir, **(values | options))


def test_every_node_is_sampled_by_mlflows_own_monitors(uri, tmp_path, without_process, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    run = begin(uri, tmp_path / "o")
    assert without_process[0][-2:] == ["10.0", "node_0"]
    config = TrackingConfig(uri=uri, experiment="t")
    for rank, local in ((1, 1), (3, 1)):  # one of a node's ranks is enough
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert watch_node(config, run_id=run.run_id, output_dir=tmp_path / "o").run_id == ""
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    other = watch_node(config, run_id=run.run_id, output_dir=tmp_path / "o")
    assert without_process[-1][-1] == "node_1"
    folder = tmp_path / "o" / "tracking"
    spools = {node: Spool.at(folder / name) for node, name in
              (("node_0", f"{run.run_id}.jsonl"), ("node_1", f"{run.run_id}.node_1.jsonl"))}  # fmt: skip
    for node, spool in spools.items():
        samples = SystemRecords(spool, every=0.0, node=node)
        assert samples.sample()
        assert samples.sample()
        assert not SystemRecords(spool, every=100.0, node=node).sample()
    with pytest.raises(ConnectionError, match="not in MLflow yet"):
        Sender(spools["node_1"]).send()
    other.finish()
    run.finish()
    assert [problem for _, problem in sync(tmp_path)] == ["", ""]
    (found,) = load_runs(uri)
    assert found.status == "FINISHED"
    for node in spools:
        assert [step for step, _ in found.history(f"system/{node}/cpu_utilization_percentage")] == [0, 1]
        assert found.metrics[f"system/{node}/system_memory_usage_megabytes"] > 0
    assert SystemRecords(spools["node_1"], every=0.0, node="node_1")._step == 2  # a resumed run continues


def test_data_sets_are_inputs_and_evaluations_lie_inside_their_training(uri, tmp_path, without_process):
    training = begin(uri, tmp_path / "a")
    training.log_dataset("set/train", digest="d" * 64, source="shards", context="training", profile={"num_samples": 3})
    training.finish()
    with begin(uri, tmp_path / "b", experiment="another", stage="evaluate", parents=[training.run_id]) as evaluation:
        evaluation.log_dataset("set/val", digest="e" * 64, source="https://x.org/val", context="evaluation")
    assert [problem for _, problem in sync(tmp_path)] == ["", ""]
    first, second = load_runs(uri)
    assert second.tags["mlflow.parentRunId"] == first.mlflow_run_id
    inputs = [r.client.get_run(r.mlflow_run_id).inputs.dataset_inputs[0] for r in (first, second)]
    assert [i.dataset.digest for i in inputs] == ["d" * 36, "e" * 36]
    assert [(i.dataset.name, i.tags[0].value) for i in inputs] == [("set/train", "training"), ("set/val", "evaluation")]
    assert json.loads(inputs[0].dataset.profile) == {"num_samples": 3}
    assert Path(json.loads(inputs[0].dataset.source)["uri"]) == Path("shards").absolute()
    from mlflow.data import get_source

    assert get_source(inputs[1].dataset).url == "https://x.org/val"
    assert first.url == ""


class _Locked(BaseHTTPRequestHandler):
    """A server that lets only one user in, and knows no experiment."""

    def _answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        allowed = self.headers.get("Authorization") == "Basic dXNlcjpzZWNyZXQtd29yZA=="  # user:secret-word
        body = b'{"experiments": []}' if allowed else b"You are not authenticated."
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture
def locked():
    server = HTTPServer(("127.0.0.1", 0), _Locked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_server_that_asks_for_a_password(locked, tmp_path, without_process, monkeypatch):
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    with begin(locked, tmp_path / "o") as run:
        run.log_metrics({"train/loss": 1.0}, 1)  # which the training never waits for
    ((spool, problem),) = sync(tmp_path)
    assert problem.startswith("the server asks for a user and a password; set MLFLOW_TRACKING_USERNAME")
    assert spool.unsent == 5
    with pytest.raises(UserError, match=r"cannot be read \(the server asks for a user and a password; set MLFLOW"):
        load_runs(locked)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-word")
    ((_, problem),) = sync(tmp_path)
    assert problem.startswith("the server refuses the user and password")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret-word")
    assert load_runs(locked) == []
    kept = "".join(path.read_text() for path in (tmp_path / "o").rglob("*") if path.is_file())
    assert "wrong-word" not in kept
    assert "secret-word" not in kept


def test_a_password_in_the_address_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(UserError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as refusal:
        begin("https://user:secret-word@mlflow.example.org", tmp_path / "o")
    assert "secret-word" not in str(refusal.value)
    assert not (tmp_path / "o").exists()


def test_a_databases_password_is_used_and_kept_nowhere(tmp_path, without_process, monkeypatch):
    """MLflow takes it from the address alone; the driver that is missing here is what the attempt ends at."""
    whole, shown = "postgresql://user:secret-word@127.0.0.1:9/db", "postgresql://user:***@127.0.0.1:9/db"
    with begin(whole, tmp_path / "o") as run:
        run.set_tags({"where": whole})
    kept = "".join(path.read_text() for path in (tmp_path / "o").rglob("*") if path.is_file())
    assert shown in kept
    assert "secret-word" not in kept
    ((_, problem),) = sync(tmp_path)
    assert "set DPT_TRACKING_URI to the whole address" in problem
    for way in ("variable", "option"):
        monkeypatch.setenv("DPT_TRACKING_URI", whole if way == "variable" else "")
        ((_, problem),) = sync(tmp_path, uri=whole if way == "option" else "")
        assert problem
        assert "DPT_TRACKING_URI" not in problem
        assert "secret-word" not in problem
    kept = "".join(path.read_text() for path in (tmp_path / "o").rglob("*") if path.is_file())
    assert "secret-word" not in kept


@pytest.mark.parametrize(
    ("task", "inputs", "output"),
    [("depth", ["image"], "depth"), ("flow", ["image", "second_frame"], "flow"), ("normals", ["image"], "normals")],
)
def test_registered_weights_have_a_signature(task, inputs, output, tmp_path):
    """Of tasks that users have registered, too."""
    from mlflow.models import Model

    (tmp_path / "config.json").write_text(json.dumps({"task": task, "model": {}}))
    write_model_card(tmp_path / "model", tmp_path, "run")
    signature = Model.load(tmp_path / "model" / "MLmodel").signature
    assert [spec.name for spec in signature.inputs.inputs] == inputs
    assert [spec.name for spec in signature.outputs.inputs] == [output]


def test_runs_on_servers_have_pages():
    assert run_url("https://mlflow.example.org/", "7", "abc") == "https://mlflow.example.org/#/experiments/7/runs/abc"
    assert run_url("sqlite:////x/mlflow.db", "7", "abc") == ""
