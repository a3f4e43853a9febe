"""The spool, and sending it to a store that fails, refuses and forgets (a client in memory, no MLflow server)."""

import json
import select
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpt.tracking.delivery import MAX_METRICS, Sender, _groups
from dpt.tracking.sender import serve, sync
from dpt.tracking.spool import Spool, SpoolState


class Refusal(Exception):
    error_code = "INVALID_PARAMETER_VALUE"


class FakeClient:
    """The part of MlflowClient that the sender uses, in memory; `down` makes every call fail."""

    def __init__(self):
        self.down = False
        self.runs = {}
        self.experiments = {}
        self.calls = 0

    def _up(self):
        self.calls += 1
        if self.down:
            raise ConnectionError("connection refused")

    def get_experiment_by_name(self, name):
        self._up()
        return self.experiments.get(name)

    def create_experiment(self, name, artifact_location=None):
        self._up()
        self.experiments[name] = SimpleNamespace(experiment_id=str(len(self.experiments) + 1))
        return self.experiments[name].experiment_id

    def search_runs(self, experiment_ids, filter_string, max_results):
        self._up()
        return [r for r in self.runs.values() if f"'{r.tags['dpt.run_id']}'" in filter_string]

    def create_run(self, experiment, start_time, tags, run_name):
        self._up()
        run_id = f"server-{len(self.runs)}"
        info = SimpleNamespace(run_id=run_id, status="RUNNING")
        self.runs[run_id] = SimpleNamespace(
            info=info, tags=dict(tags), points=[], artifacts=[], data=SimpleNamespace(params={})
        )
        return self.runs[run_id]

    def get_run(self, run_id):
        self._up()
        return self.runs[run_id]

    def update_run(self, run_id, status):
        self._up()
        self.runs[run_id].info.status = status

    def set_terminated(self, run_id, status, end_time):
        self._up()
        self.runs[run_id].info.status = status

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        self._up()
        if any(m.key == "bad" for m in metrics):
            raise Refusal("bad metric")
        assert len(metrics) <= MAX_METRICS
        self.runs[run_id].points += [(m.key, m.step, m.value) for m in metrics]
        self.runs[run_id].data.params |= {p.key: p.value for p in params}
        self.runs[run_id].tags |= {t.key: t.value for t in tags}

    def log_artifact(self, run_id, path, folder):
        self._up()
        self.runs[run_id].artifacts.append((folder, Path(path).read_bytes()))


@pytest.fixture
def client():
    return FakeClient()


@pytest.fixture
def spool(tmp_path):
    spool = Spool(tmp_path / "tracking", "r1")
    start = {"uri": "http://nowhere", "experiment": "e", "name": "n", "stage": "pretrain", "parents": ["p"], "tags": {}}
    spool.append({"kind": "start", "time": 1, "run_id": "r1", **start})
    return spool


def metrics(spool, step, **values):
    spool.append({"kind": "metrics", "time": step, "step": step, "values": values})


def sender(spool, client):
    return Sender(spool, connect=lambda uri: client)


def test_an_outage_at_start_in_the_middle_and_at_the_end_costs_no_record(spool, client):
    client.down = True
    with pytest.raises(ConnectionError):
        sender(spool, client).send()
    assert spool.state.error == "connection refused"
    metrics(spool, 1, loss=1.0)
    client.down = False
    live = sender(spool, client)
    live.send()
    metrics(spool, 2, loss=0.5)
    client.down = True
    with pytest.raises(ConnectionError):
        live.send()
    client.down = False
    live.send()
    spool.append({"kind": "finish", "time": 3, "status": "FINISHED"})
    client.down = True
    with pytest.raises(ConnectionError):
        live.send()
    assert spool.unsent == 1
    client.down = False
    sender(spool, client).send()
    (run,) = client.runs.values()
    assert run.points == [("loss", 1, 1.0), ("loss", 2, 0.5)]
    assert run.info.status == "FINISHED"
    assert run.tags["dpt.parents"] == "p"
    assert spool.unsent == 0
    assert spool.state.error == ""


def test_nothing_is_sent_twice(spool, client):
    metrics(spool, 1, loss=1.0)
    sender(spool, client).send()
    calls = client.calls
    sender(spool, client).send()
    assert client.calls == calls


def test_a_resumed_run_is_found_again_and_changed_params_become_tags(spool, client):
    spool.append({"kind": "params", "values": {"training.steps": "10", "long": "x" * 7000}})
    sender(spool, client).send()
    spool.append({**next(spool.read())[0], "time": 9})
    spool.append({"kind": "params", "values": {"training.steps": "20", "new": "1"}})
    sender(spool, client).send()
    (run,) = client.runs.values()
    assert run.data.params["training.steps"] == "10"
    assert run.data.params["new"] == "1"
    assert len(run.data.params["long"]) == 6000
    assert run.tags["dpt.resumed.training.steps"] == "20"


def test_what_the_store_refuses_is_dropped_alone(spool, client):
    metrics(spool, 1, loss=1.0)
    metrics(spool, 2, loss=2.0, bad=0.0, grad=3.0)
    metrics(spool, 3, loss=3.0)
    sender(spool, client).send()
    (run,) = client.runs.values()
    assert sorted(run.points) == [("grad", 2, 3.0), ("loss", 1, 1.0), ("loss", 2, 2.0), ("loss", 3, 3.0)]
    assert spool.state.rejected == 1


def test_batches_hold_as_many_points_as_the_store_takes(spool):
    for step in range(700):
        metrics(spool, step, a=1.0, b=2.0, c=3.0)
    groups = [group for group, _ in _groups(spool.read())]
    assert [g[0]["kind"] for g in groups] == ["start", "metrics", "metrics", "metrics"]
    assert [sum(len(r["values"]) for r in g) for g in groups[1:]] == [999, 999, 102]


def test_a_torn_last_line_costs_only_itself(spool):
    metrics(spool, 1, loss=1.0)
    spool.close()
    with spool.path.open("a") as file:
        file.write('{"kind": "metr')
    assert [r["kind"] for r, _ in spool.read()] == ["start", "metrics"]
    metrics(spool, 2, loss=2.0)
    assert [r.get("step") for r, _ in spool.read()] == [None, 1, 2]
    assert spool.last_steps() == {"loss": 2}


def test_files_are_kept_as_they_were_and_copies_go_once_sent(spool, client, tmp_path):
    picture = tmp_path / "x.png"
    picture.write_bytes(b"first")
    kept = spool.keep_file(picture, "sample.png")
    spool.append({"kind": "artifact", "path": str(kept), "folder": "pictures"})
    spool.append({"kind": "artifact", "path": str(tmp_path / "gone"), "folder": ""})
    picture.write_bytes(b"second")
    sender(spool, client).send()
    (run,) = client.runs.values()
    assert run.artifacts == [("pictures", b"first")]
    assert not kept.exists()
    assert picture.exists()
    assert spool.state.rejected == 1


def test_one_sender_at_a_time(spool, client):
    with spool.locked(wait=False) as first, Spool(spool.folder, spool.run_id).locked(wait=False) as second:
        assert first
        assert not second
    with spool.locked(wait=True):
        assert sender(spool, client).send(wait=False) is False
    assert client.calls == 0


def test_a_spool_that_its_own_run_is_sending_is_not_begun_again(spool, client):
    sender(spool, client).send()
    before = spool.state
    with spool.locked(wait=True):
        ((_, reason),) = sync(spool.folder.parent, again=True)
    assert reason == "its own run is sending it"
    assert spool.state == before
    assert before.offset


def test_a_run_that_has_been_resumed_is_not_marked_as_failed_by_the_sender_of_its_earlier_life(spool, monkeypatch):
    """A killed run's sender may still be busy when the run is resumed."""
    begin = next(spool.read())[0]
    monkeypatch.setattr(Sender, "send", lambda self: True)

    def killed_and_resumed(*streams):
        spool.append(begin)
        return streams

    monkeypatch.setattr(select, "select", killed_and_resumed)  # the end of stdin: the run has been killed
    assert serve(spool) == 0
    assert [record["kind"] for record, _ in spool.read()] == ["start", "start"]
    monkeypatch.setattr(select, "select", lambda *streams: streams)
    for _ in range(2):  # the second time it had ended before its sender began
        assert serve(spool) == 0
        assert [record["kind"] for record, _ in spool.read()] == ["start", "start", "finish"]


def test_a_broken_cursor_starts_over(spool):
    spool.write_state(SpoolState(offset=5))
    assert spool.state.offset == 5
    (spool.folder / "r1.state.json").write_text(json.dumps({"unknown": 1}))
    assert spool.state == SpoolState()


def test_spools_are_found_parents_first(tmp_path):
    for run_id, moment in (("b", 1), ("a", 2)):
        Spool(tmp_path / run_id / "tracking", run_id).append({"kind": "start", "time": moment})
    assert [s.run_id for s in Spool.find(tmp_path)] == ["b", "a"]
