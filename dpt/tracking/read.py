"""Read runs back from MLflow; histories, artifacts and ancestors are fetched on demand."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpt.errors import UserError
from dpt.tracking import store


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run. `run_id` is ours (the tag `dpt.run_id`; MLflow's own id for runs that dpt did not make)."""

    run_id: str
    mlflow_run_id: str
    experiment: str
    name: str
    stage: str
    status: str
    start_time: float
    """Seconds since 1970."""
    end_time: float | None
    parents: list[str]
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    """Last value of every metric."""
    client: Any = field(repr=False, compare=False, default=None)
    url: str = ""
    """The run's page on its server; empty for a store in a file."""

    @property
    def label(self) -> str:
        """The run's label in tables: the tag `dpt.label`, else its name."""
        return self.tags.get("dpt.label") or self.name or self.run_id[:8]

    def history(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric in order of steps; the latest value where a step was recorded twice."""
        points = self.client.get_metric_history(self.mlflow_run_id, metric)
        by_step = {p.step: p.value for p in sorted(points, key=lambda p: p.timestamp)}
        return sorted(by_step.items())

    def artifacts(self, folder: str = "") -> list[str]:
        """Paths of the files below `folder`, sorted."""
        found: list[str] = []
        for entry in self.client.list_artifacts(self.mlflow_run_id, folder or None):
            found += self.artifacts(entry.path) if entry.is_dir else [entry.path]
        return sorted(found)

    def download(self, path: str, to: Path | None = None) -> Path:
        """A local copy of an artifact (or the file itself, for a local store)."""
        if to is not None:
            to.mkdir(parents=True, exist_ok=True)
        return Path(self.client.download_artifacts(self.mlflow_run_id, path, str(to) if to is not None else None))

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe (artifact `recipe.json`); empty if the run has none."""
        if "recipe.json" not in self.artifacts():
            return {}
        return dict(json.loads(self.download("recipe.json").read_text(encoding="utf-8")))


def load_runs(
    uri: str, experiment: str | None = None, run_ids: Iterable[str] | None = None, filter: str = ""
) -> list[RunRecord]:
    """Load a store's runs, oldest first: of an experiment (None: all), or named by `run_ids` (ours, MLflow's, run names).

    `filter` is a condition in MLflow's search language, e.g. "metrics.`train/loss` < 1". Raises UserError if the store, the
    experiment or a named run does not exist.
    """
    uri = store.absolute_uri(uri)
    path = store.sqlite_path(uri)
    if path is not None and not path.is_file():
        raise UserError(
            f"{path}: there is no MLflow store here; give the one of the runs with --uri sqlite:///PATH or http://HOST:PORT."
        )
    client = store.connect(uri)
    try:
        names = {e.experiment_id: e.name for e in client.search_experiments()}
        if experiment is not None and experiment not in names.values():
            known = ", ".join(sorted(n for n in names.values() if n != "Default")) or "none"
            raise UserError(f'experiment "{experiment}": {uri} has no such experiment (it has: {known}).')
        ids = [i for i, name in names.items() if experiment in (None, name)]
        runs = _search(client, ids, filter)
    except UserError:
        raise
    except Exception as error:
        if filter and getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--filter {filter!r}: MLflow does not understand it ({reason}); conditions are such as "
                "\"params.task = 'depth'\" "
                'or "metrics.`train/loss` < 1", joined by and.'
            ) from error
        raise UserError(f"{uri}: the MLflow store cannot be read ({store.problem(error)}).") from error
    records = [_record(client, run, names, uri) for run in runs]
    records.sort(key=lambda r: r.start_time)
    return records if run_ids is None else _named(records, list(run_ids), uri)


def _search(client: Any, experiment_ids: list[str], filter: str) -> list[Any]:
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs(experiment_ids, filter_string=filter, max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def run_url(uri: str, experiment_id: str, mlflow_run_id: str) -> str:
    """Address of a run's page on the server `uri`; empty if that is a file."""
    if not uri.startswith(("http://", "https://")):
        return ""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{mlflow_run_id}"


def _record(client: Any, run: Any, experiments: dict[str, str], uri: str) -> RunRecord:
    tags = dict(run.data.tags)
    return RunRecord(
        run_id=tags.get("dpt.run_id", run.info.run_id),
        mlflow_run_id=run.info.run_id,
        experiment=experiments.get(run.info.experiment_id, ""),
        name=run.info.run_name or "",
        stage=tags.get("dpt.stage", ""),
        status=run.info.status,
        start_time=run.info.start_time / 1000,
        end_time=run.info.end_time / 1000 if run.info.end_time else None,
        parents=[p for p in tags.get("dpt.parents", "").split(",") if p],
        params=dict(run.data.params),
        tags=tags,
        metrics=dict(run.data.metrics),
        client=client,
        url=run_url(uri, run.info.experiment_id, run.info.run_id),
    )


def _named(records: list[RunRecord], wanted: list[str], uri: str) -> list[RunRecord]:
    chosen = []
    for name in wanted:
        matches = [r for r in records if name in (r.run_id, r.mlflow_run_id, r.name)]
        if not matches and len(name) >= 6:
            matches = [r for r in records if r.run_id.startswith(name) or r.mlflow_run_id.startswith(name)]
        if not matches:
            raise UserError(f'run "{name}": {uri} has no run with this id or name.')
        chosen += [m for m in matches if m not in chosen]
    return chosen


def ancestors(record: RunRecord, records: Iterable[RunRecord]) -> list[RunRecord]:
    """The runs that `record` descends from, nearest first, each once; runs not in `records` are omitted."""
    by_id = {r.run_id: r for r in records}
    found: list[RunRecord] = []
    queue = list(record.parents)
    while queue:
        parent = by_id.get(queue.pop(0))
        if parent is not None and parent not in found and parent.run_id != record.run_id:
            found.append(parent)
            queue += parent.parents
    return found


def with_ancestors(records: list[RunRecord], uri: str) -> list[RunRecord]:
    """`records` and the runs that they descend from, in any experiment; oldest first."""
    known = {r.run_id: r for r in records}
    missing = {p for r in records for p in r.parents} - known.keys()
    while missing:
        # One search each: MLflow's conditions on tags know neither IN nor OR.
        found = [r for run_id in sorted(missing) for r in load_runs(uri, filter=f"tags.`dpt.run_id` = '{run_id}'")]
        known |= {r.run_id: r for r in found}
        missing = {p for r in found for p in r.parents} - known.keys()
    return sorted(known.values(), key=lambda r: r.start_time)
