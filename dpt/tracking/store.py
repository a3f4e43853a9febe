"""MLflow stores: addresses, clients that fail fast, and the experiment of a run."""

import contextlib
import json
import os
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dpt.errors import HIDDEN, UserError, hide_passwords
from dpt.locking import taking_turns

_SQLITE = "sqlite:///"
SECRET = "DPT_TRACKING_URI"
"""Variable with the full address of a database whose password the records omit."""
_PROBE_SECONDS = 3.0


def absolute_uri(uri: str) -> str:
    """`uri` with an SQLite path made absolute, so that it means the same from any working directory.

    Raises UserError for a plain folder or `file:` store, which MLflow no longer writes, and for a server's address with a user
    or a password in it, which belong in the environment. A database's may have them: they are hidden wherever it is written.
    """
    if uri.startswith(("http://", "https://")) and "@" in urlsplit(uri).netloc:
        raise UserError(
            f"{hide_passwords(uri)}: the address holds a user name or a password; give them in the environment, "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and the address without them."
        )
    if uri.startswith(_SQLITE):
        return _SQLITE + str(Path(uri.removeprefix(_SQLITE)).absolute())
    if "://" not in uri or uri.startswith("file:"):
        raise UserError(
            f'"{uri}" is no MLflow store; give an SQLite file (sqlite:///mlflow.db) or a server (http://HOST:PORT) as '
            "dpt.tracking.uri, or as --uri."
        )
    return uri


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite store; None for a server."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def check_sqlite(uri: str) -> None:
    """Raise UserError if the file of an SQLite store cannot be opened (MLflow would retry for minutes); no-op for a server."""
    path = sqlite_path(uri)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=_PROBE_SECONDS)) as connection:
            connection.execute("PRAGMA schema_version")
    except (OSError, sqlite3.Error) as error:
        if "locked" not in str(error):  # somebody writes to it
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{path}: no SQLite store can be opened there ({reason}); give another one (sqlite:///PATH)."
            ) from error


def out_of_reach(uri: str) -> str:
    """Why nothing answers at a server's address within seconds; empty if something does, or it is no web server's address."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return ""
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=_PROBE_SECONDS).close()
    except (OSError, ValueError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def with_password(uri: str) -> str:
    """The recorded address with its hidden password restored from the variable `SECRET`; UserError without it."""
    if f":{HIDDEN}@" not in uri:
        return uri
    whole = os.environ.get(SECRET, "")
    if hide_passwords(whole) != uri:
        raise UserError(f"{uri}: records do not hold passwords; set {SECRET} to the whole address, or give it with --uri.")
    return whole


def connect(uri: str) -> Any:
    """Return an `MlflowClient` that gives up on a silent server after seconds, not minutes (our callers retry).

    Raises UserError for an invalid SQLite store, and for a database whose driver is not installed.
    """
    uri = with_password(uri)
    check_sqlite(uri)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    try:
        with _one_at_a_time(uri):
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{hide_passwords(uri)}: the database's driver {error.name} is not installed; install it, or name an installed one "
            "in the address (mysql+pymysql://...)."
        ) from error


@contextlib.contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Lock an SQLite store's file, whose tables the first client makes: two at once would break each other's."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    with taking_turns(path.with_name(f"{path.name}.lock")):
        yield


def problem(error: Exception) -> str:
    """A store's error in one sentence, without its server's pages."""
    status = error.get_http_status_code() if hasattr(error, "get_http_status_code") else 0
    if status == 401:
        known = bool(os.environ.get("MLFLOW_TRACKING_USERNAME") or os.environ.get("MLFLOW_TRACKING_TOKEN"))
        state = "refuses the user and password" if known else "asks for a user and a password"
        return f"the server {state}; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
    if status == 403:
        return "the server knows the user, but does not permit this; ask its administrator for the right to the experiment"
    return str(error).split("\n", 1)[0][:300] or type(error).__name__


def experiment_id(client: Any, uri: str, name: str) -> str:
    """Id of the experiment, created if missing; an SQLite store's artifacts are in `mlruns` beside the file."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    path = sqlite_path(uri)
    location = (path.parent / "mlruns" / name.replace("/", "_")).as_uri() if path is not None else None
    return str(client.create_experiment(name, artifact_location=location))


def find_run(client: Any, experiment_ids: list[str], run_id: str) -> Any | None:
    """The MLflow run that carries our `run_id`; None if there is none."""
    runs = client.search_runs(experiment_ids, filter_string=f"tags.`dpt.run_id` = '{run_id}'", max_results=1)
    return runs[0] if runs else None


def write_model_card(folder: Path, weights: Path, run_id: str) -> None:
    """Write `folder/MLmodel` for exported weights: their inputs and outputs by task, and their location."""
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    task = config.get("task", "class")
    image = TensorSpec(np.dtype("uint8"), (-1, -1, -1, 3), "image")
    second = {
        "flow": [TensorSpec(np.dtype("uint8"), (-1, -1, -1, 3), "second_frame")],
        "amodal": [TensorSpec(np.dtype("bool"), (-1, -1, -1), "visible_mask")],
    }
    outputs = {
        "class": image,
        "depth": TensorSpec(np.dtype("float32"), (-1, -1, -1), "depth"),
        "flow": TensorSpec(np.dtype("float32"), (-1, 2, -1, -1), "flow"),
        "amodal": TensorSpec(np.dtype("bool"), (-1, -1, -1), "mask"),
    }
    output = outputs.get(task, TensorSpec(np.dtype("float32"), (-1, -1, -1, -1), task))  # registered task: [B, C, H, W]
    signature = None
    if task != "generalist":  # a generalist has several outputs
        label = TensorSpec(np.dtype("int64"), (-1,), "label")
        inputs = [label] if task == "class" else [image, *second.get(task, [])]
        signature = ModelSignature(inputs=Schema(inputs), outputs=Schema([output]))
    metadata = {"task": task, "weights": str(weights), "model": config["model"]}
    folder.mkdir(parents=True)
    Model(artifact_path="model", run_id=run_id, signature=signature, metadata=metadata).save(folder / "MLmodel")
