"""Delivers the records of a spool to MLflow.

A record may be sent again after a crash between sending and moving the cursor. That adds nothing: MLflow drops a point
whose name, step, time and value it has, the run is looked up by its tag `dpt.run_id` before it is made, and tags, parameters
and artifacts replace themselves.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpt.errors import hide_passwords
from dpt.tracking import store
from dpt.tracking.spool import Spool, SpoolState

_log = logging.getLogger(__name__)

MAX_METRICS = 1000  # MLflow's limits of one batch
MAX_PARAMS = 100
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 5000
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class Sender:
    """Sends one spool. `connect(uri)` gives an MlflowClient; `uri` replaces the one in the records."""

    def __init__(self, spool: Spool, *, uri: str = "", connect: Callable[[str], Any] = store.connect) -> None:
        self._spool = spool
        self._uri = uri
        self._connect = connect
        self._client: Any = None
        self._client_uri = ""
        self.state: SpoolState = spool.state
        self.finished = False

    def send(self, *, wait: bool = True, again: bool = False) -> bool:
        """Send everything after the cursor (`again`: all); return False if another process is sending and `wait` is False.

        Raises what the store raises, with the cursor moved past what was sent.
        """
        with self._spool.locked(wait=wait) as mine:
            if not mine:
                return False
            self.state = SpoolState() if again else self._spool.state
            try:
                for group, offset in _groups(self._spool.read(self.state.offset)):
                    self._deliver(group)
                    self.state.offset = offset
                    self._save(error="")
                    self._forget_copies(group)
            except Exception as error:
                self._save(error=store.problem(error))
                raise
        return True

    def _save(self, *, error: str) -> None:
        self.state.error = error
        self._spool.write_state(self.state)

    def _deliver(self, group: list[dict[str, Any]]) -> None:
        """Send a group; what the store permanently refuses is split until only the bad value is left, which is dropped."""
        try:
            self._deliver_whole(group)
        except Exception as error:
            if getattr(error, "error_code", "") not in _REFUSALS or group[0]["kind"] in ("start", "join"):
                raise
            parts = _split(group)
            if len(parts) == 1:
                self.state.rejected += 1
                _log.error("refused for good: %s: %s", group[0], hide_passwords(str(error)))
                return
            for part in parts:
                self._deliver(part)

    def _deliver_whole(self, group: list[dict[str, Any]]) -> None:
        first = group[0]
        if first["kind"] == "start":
            self._start(first)
            return
        if first["kind"] == "join":
            self._join(first)
            return
        client, run_id = self._connected(), self.state.mlflow_run_id
        if first["kind"] == "metrics":
            from mlflow.entities import Metric

            points = [Metric(k, v, r["time"], r["step"]) for r in group for k, v in r["values"].items()]
            client.log_batch(run_id, metrics=points)
        elif first["kind"] == "tags":
            client.log_batch(run_id, tags=_tags(first["values"]))
        elif first["kind"] == "params":
            self._send_params(first["values"])
        elif first["kind"] == "artifact":
            self._send_file(first)
        elif first["kind"] == "dataset":
            self._send_dataset(first)
        elif first["kind"] == "model":
            self._register(first)
        elif first["kind"] == "finish":
            client.set_terminated(run_id, status=first["status"], end_time=first["time"])
            self.finished = True

    def _connected(self) -> Any:
        uri = self._uri or self.state.uri  # the latter without a password
        if self._client is None or self._client_uri != uri:
            self._client, self._client_uri = self._connect(uri), uri
        return self._client

    def _start(self, record: dict[str, Any]) -> None:
        """Create the run in MLflow, or find it if an earlier process created it."""
        self.state.uri = self._uri or record["uri"]
        client = self._connected()
        experiment = store.experiment_id(client, self.state.uri, record["experiment"])
        run = store.find_run(client, [experiment], record["run_id"])
        if run is None:
            tags = {
                **record["tags"],
                "dpt.run_id": record["run_id"],
                "dpt.stage": record["stage"],
                "dpt.parents": ",".join(record["parents"]),
                **self._nesting(client, experiment, record),
            }
            run = client.create_run(experiment, start_time=record["time"], tags=_clip(tags), run_name=record["name"])
        else:
            client.update_run(run.info.run_id, status="RUNNING")
        self.state.mlflow_run_id = run.info.run_id
        self.finished = False

    def _join(self, record: dict[str, Any]) -> None:
        """Find the run that another node's sender creates; ConnectionError while it does not exist."""
        self.state.uri = self._uri or record["uri"]
        client = self._connected()
        experiment = client.get_experiment_by_name(record["experiment"])
        run = store.find_run(client, [experiment.experiment_id], record["run_id"]) if experiment is not None else None
        if run is None:
            raise ConnectionError(f"run {record['run_id']} is not in MLflow yet")
        self.state.mlflow_run_id = run.info.run_id

    def _nesting(self, client: Any, experiment: str, record: dict[str, Any]) -> dict[str, str]:
        """Tags that show an evaluation inside the run that it evaluates, in any experiment of the store."""
        if record["stage"] != "evaluate" or not record["parents"]:
            return {}
        others = [e.experiment_id for e in client.search_experiments() if e.experiment_id != experiment]
        parent = None
        for place in ([experiment], others):
            parent = parent or (store.find_run(client, place, record["parents"][0]) if place else None)
        return {"mlflow.parentRunId": parent.info.run_id} if parent is not None else {}

    def _send_params(self, values: dict[str, str]) -> None:
        """Send parameters. MLflow's never change, so a resumed run's differing values become tags `dpt.resumed.NAME`."""
        from mlflow.entities import Param

        client, run_id = self._connected(), self.state.mlflow_run_id
        known = client.get_run(run_id).data.params
        clipped = {k: v if len(v) <= MAX_PARAM_CHARS else v[: MAX_PARAM_CHARS - 1] + "…" for k, v in values.items()}
        fresh = [Param(k, v) for k, v in clipped.items() if k not in known]
        for start in range(0, len(fresh), MAX_PARAMS):
            client.log_batch(run_id, params=fresh[start : start + MAX_PARAMS])
        changed = _tags({f"dpt.resumed.{k}": v for k, v in clipped.items() if known.get(k, v) != v})
        for start in range(0, len(changed), MAX_PARAMS):
            client.log_batch(run_id, tags=changed[start : start + MAX_PARAMS])

    def _send_dataset(self, record: dict[str, Any]) -> None:
        """Send a data set as an input of the run, in mlflow.data's format."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        remote = "://" in record["source"]
        source = {"url" if remote else "uri": record["source"]}
        dataset = Dataset(
            name=record["name"],
            digest=record["digest"][:36],
            source_type="http" if remote else "local",
            source=json.dumps(source),
            profile=json.dumps(record["profile"]),
        )
        tag = InputTag("mlflow.data.context", record["context"])
        self._connected().log_inputs(self.state.mlflow_run_id, [DatasetInput(dataset, [tag])])

    def _send_file(self, record: dict[str, Any]) -> None:
        path = Path(record["path"])
        if not path.exists():
            self.state.rejected += 1
            _log.error("%s: gone before it could be sent", path)
        elif path.is_dir():
            folder = "/".join(part for part in (record["folder"], path.name) if part)
            self._connected().log_artifacts(self.state.mlflow_run_id, str(path), folder)
        else:
            self._connected().log_artifact(self.state.mlflow_run_id, str(path), record["folder"] or None)

    def _register(self, record: dict[str, Any]) -> None:
        """Register a model version whose source is a small MLmodel (signature, task, path of the weights); the weights are not
        copied."""
        from mlflow.exceptions import MlflowException

        client, run_id = self._connected(), self.state.mlflow_run_id
        versions = client.search_model_versions(filter_string=f"name = '{record['name']}' and run_id = '{run_id}'")
        if any(version.tags.get("dpt.folder") == record["path"] for version in versions):
            return
        try:
            client.create_registered_model(record["name"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            store.write_model_card(model, Path(record["path"]), run_id)
            client.log_artifacts(run_id, str(model), "model")
        source = client.get_run(run_id).info.artifact_uri + "/model"
        tags = {**record["tags"], "dpt.folder": record["path"]}
        client.create_model_version(record["name"], source, run_id=run_id, tags=tags)

    def _forget_copies(self, group: list[dict[str, Any]]) -> None:
        copies = self._spool.folder.absolute() / "files"
        for record in group:
            if record["kind"] == "artifact" and copies in Path(record["path"]).parents:
                shutil.rmtree(Path(record["path"]).parent, ignore_errors=True)


def _groups(records: Iterator[tuple[dict[str, Any], int]]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Group consecutive metrics records, up to the store's limit, others alone; each with the offset after it."""
    group: list[dict[str, Any]] = []
    size = behind = 0
    for record, offset in records:
        count = len(record["values"]) if record["kind"] == "metrics" else MAX_METRICS
        if group and (size + count > MAX_METRICS):
            yield group, behind
            group, size = [], 0
        group.append(record)
        size += count
        behind = offset
    if group:
        yield group, behind


def _tags(values: dict[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(k, v) for k, v in _clip(values).items()]


def _clip(tags: dict[str, str]) -> dict[str, str]:
    return {k[:250]: v[:MAX_TAG_CHARS] for k, v in tags.items()}


def _split(group: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Split a group into smaller ones: of single records, or of single values of one record."""
    if len(group) > 1:
        return [[record] for record in group]
    values = group[0].get("values", {})
    return [[{**group[0], "values": {name: value}}] for name, value in values.items()] or [group]
