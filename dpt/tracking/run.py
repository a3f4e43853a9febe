"""The training side of tracking: cheap appends to the spool; a child process (`dpt.tracking.sender`) talks to MLflow.

A process rather than a thread: the training process never imports MLflow, shares no interpreter lock with it, and when it is
killed, its records are still sent and the run is marked as failed.
"""

import atexit
import contextlib
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dpt import __version__, distributed
from dpt.config.sections import TrackingConfig
from dpt.errors import hide_passwords
from dpt.tracking.spool import Spool
from dpt.tracking.store import SECRET, absolute_uri, check_sqlite, out_of_reach

_log = logging.getLogger(__name__)

_NOTICE_SECONDS = 30.0
_TOLD_SECONDS = 3.0
_FAILED_SECONDS = 15.0
_FINISH_SECONDS = 600.0  # a busy disk takes its time; a store that fails makes the sender give up long before
_UNFIT = re.compile(r"[^\w\-. /:]", re.ASCII)


def start_run(
    config: TrackingConfig,
    *,
    stage: str,
    name: str,
    params: Mapping[str, Any],
    parents: list[str],
    output_dir: Path,
    tags: Mapping[str, str],
    resume_run_id: str | None = None,
    past_step: int = -1,
) -> "Run":
    """Begin (or resume) the record of a run; a Run that records nothing when tracking is off or on ranks other than 0.

    `stage` is "pretrain", "finetune", "upcycle" or "evaluate"; `name` is used unless the recipe names the run. `params` is the
    resolved recipe: nested, recorded flat under the dotted names of the command line and whole as the artifact `recipe.json`.
    `parents` are the run ids of the runs whose weights this one starts from. With `resume_run_id` the same run goes on, and
    only steps past `past_step` (the checkpoint's) and past what its spool already holds are recorded. Raises UserError for an
    unusable `config.uri`.
    """
    if not config.enabled or os.environ.get("RANK", "0") != "0":
        return Run()
    uri = absolute_uri(config.uri)
    if not config.offline:
        check_sqlite(uri)
        if reason := out_of_reach(uri):
            _log.warning(
                "MLflow at %s cannot be reached (%s); the records are kept and sent later.", hide_passwords(uri), reason
            )
    run = SpooledRun(Path(output_dir) / "tracking", resume_run_id or uuid.uuid4().hex, past_step)
    record = {
        "uri": uri,
        "experiment": config.experiment,
        "name": config.run_name or name,
        "stage": stage,
        "parents": [p for p in parents if p],
        "tags": {**_provenance(), **config.tags, **{k: str(v) for k, v in tags.items()}},
    }
    run.begin(record, params, offline=config.offline, every=config.system_every, node=_node())
    return run


def watch_node(config: TrackingConfig, *, run_id: str, output_dir: Path) -> "Run":
    """On nodes beside the run's first: sample this one for the run, from one of its ranks; elsewhere a Run that does nothing.

    `run_id`: ours, of the run that rank 0 has begun. Call `finish` when the training ends.
    """
    local_rank, rank = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "RANK"))
    if not config.enabled or config.offline or not config.system_every or not run_id or local_rank or not rank:
        return Run()
    run = SpooledRun(Path(output_dir) / "tracking", run_id, node=_node())
    run.join(config, _node())
    return run


def _node() -> str:
    """What this node is called among several; empty for a run on one node."""
    local_ranks = distributed.local_world_size()
    several = local_ranks < int(os.environ.get("WORLD_SIZE", "1"))
    return f"node_{int(os.environ.get('RANK', '0')) // local_ranks}" if several else ""


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested objects as {"a.b": "text"}; lists and other values as JSON, texts as they are."""
    flat: dict[str, str] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


class Run:
    """A run that records nothing; the interface of all runs. As a context manager it finishes itself (an exception: FAILED)."""

    run_id: str = ""
    """Our id of the run, known before any server answers; the tag `dpt.run_id` in MLflow. Empty: not recorded."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step. The steps of one name only go up: what is not past the last one is left out."""

    def log_picture(self, path: str | Path, name: str, step: int | None = None) -> None:
        """Keep a picture as artifact `pictures/NAME.png` or, with a step, `pictures/NAME_STEP.png` (the file's own suffix)."""

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Keep a file or a folder as an artifact, below `folder`. Folders, and files over 32 MiB, must stay until then."""

    def register_model(self, path: str | Path, name: str, tags: Mapping[str, str] | None = None) -> None:
        """Enter exported weights into the model registry as a version of `name`; their folder stays where it is.

        `tags` say what should be seen there, such as the stage and the metrics.
        """

    def log_dataset(
        self, name: str, *, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Record a data set as an input of the run. `source`: its folder or URL; `context`: "training" or "evaluation";
        `profile`: what MLflow's page shows of it."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run."""

    def finish(self, status: str = "FINISHED") -> None:
        """End the run ("FINISHED", "FAILED" or "KILLED") and wait, within limits, until all is sent."""

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.finish("KILLED" if killed else "FAILED" if kind is not None else "FINISHED")


class SpooledRun(Run):
    """A run whose records go to a spool, with a sender beside it."""

    def __init__(self, folder: Path, run_id: str, past_step: int = -1, *, node: str = "") -> None:
        self.run_id = run_id
        self._spool = Spool(folder, run_id, node)
        self._past_step = past_step
        self._last_steps = self._spool.last_steps()
        self._sender: subprocess.Popen[bytes] | None = None
        self._finished = False
        self._broken = False
        self._next_check = time.monotonic() + _NOTICE_SECONDS

    def join(self, config: TrackingConfig, node: str) -> None:
        """Sample this node for a run that another node has begun."""
        uri = absolute_uri(config.uri)
        self._append("join", uri=uri, experiment=config.experiment)
        self._start_sender(config.system_every, node, uri)
        atexit.register(self._at_exit, os.getpid())

    def begin(
        self, record: dict[str, Any], recipe: Mapping[str, Any], *, offline: bool = False, every: float = 0.0, node: str = ""
    ) -> None:
        """Write the first record and, unless `offline`, start the sender, which samples the node called `node` every so many
        seconds (0: never)."""
        self._append("start", **record)
        self._append("params", values=flatten({k: v for k, v in recipe.items() if k != "dpt"} | recipe.get("dpt", {})))
        with self._survives(), tempfile.TemporaryDirectory() as folder:
            recipe_path = Path(folder) / "recipe.json"
            recipe_path.write_text(hide_passwords(json.dumps(recipe, indent=2, default=str)))
            self.log_artifact(recipe_path)
        if not offline:
            self._start_sender(every, node, record["uri"])
        atexit.register(self._at_exit, os.getpid())

    def _start_sender(self, every: float, node: str, uri: str) -> None:
        with self._survives():
            self._sender = subprocess.Popen(  # which gets a password in its environment, where records do not show it
                [sys.executable, "-m", "dpt.tracking.sender", str(self._spool.path.absolute()), str(every), node],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {SECRET: uri},
            )

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        values = {}
        for key, value in metrics.items():
            name = _UNFIT.sub("_", key)
            if step > max(self._past_step, self._last_steps.get(name, self._past_step)):
                self._last_steps[name] = step
                values[name] = float(value)
        if values:
            self._append("metrics", step=int(step), values=values)

    def log_picture(self, path: str | Path, name: str, step: int | None = None) -> None:
        suffix = Path(path).suffix or ".png"
        self._keep(Path(path), "pictures", (name if step is None else f"{name}_{step:08d}") + suffix)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        self._keep(Path(path), folder, Path(path).name)

    def register_model(self, path: str | Path, name: str, tags: Mapping[str, str] | None = None) -> None:
        self._append("model", path=str(Path(path).absolute()), name=name, tags={k: str(v) for k, v in (tags or {}).items()})

    def log_dataset(
        self, name: str, *, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        place = source if "://" in source else str(Path(source).absolute())
        self._append("dataset", name=name, digest=digest, source=place, context=context, profile=dict(profile or {}))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._append("tags", values={k: str(v) for k, v in tags.items()})

    def finish(self, status: str = "FINISHED") -> None:
        if self._finished:
            return
        if not self._spool.joins:
            self._append("finish", status=status)
        self._finished = True
        self._spool.close()
        if self._sender is None or self._sender.stdin is None:
            return
        self._sender.stdin.close()
        self._wait(self._sender)
        unsent, state = self._spool.unsent, self._spool.state
        if state.rejected:
            _log.warning("MLflow refused records of run %s for good (%d): %s.", self.run_id, state.rejected, self._spool.log)
        if unsent:
            _log.warning(
                "%d records of run %s have not reached MLflow (%s); they are kept: `dpt sync %s` sends them.",
                unsent, self.run_id, state.error or "still sending", self._spool.folder.parent,
            )  # fmt: skip

    def _wait(self, sender: "subprocess.Popen[bytes]") -> None:
        """Until all is sent; not long where the store has failed, as the sender then ends by itself."""
        begun, told = time.monotonic(), False
        while sender.poll() is None and (waited := time.monotonic() - begun) < _FINISH_SECONDS:
            if waited > _TOLD_SECONDS and not told and (unsent := self._spool.unsent):
                told = True
                _log.warning("Sending the last %d records of run %s to MLflow.", unsent, self.run_id)
            if waited > _FAILED_SECONDS and self._spool.state.error:
                return
            time.sleep(0.05)

    def _keep(self, path: Path, folder: str, name: str) -> None:
        with self._survives():
            self._append("artifact", path=str(self._spool.keep_file(path, name)), folder=folder)

    def _append(self, kind: str, **content: Any) -> None:
        if self._finished:
            raise AssertionError(f"run {self.run_id} is finished; nothing can be recorded any more")
        with self._survives():
            self._spool.append({"kind": kind, "time": int(time.time() * 1000), "run_id": self.run_id, **content})
        if time.monotonic() > self._next_check:
            self._next_check = time.monotonic() + _NOTICE_SECONDS
            error = self._spool.state.error
            if error:
                self._next_check = float("inf")
                _log.warning("MLflow cannot be reached (%s); the records are kept and sent later.", error)

    @contextlib.contextmanager
    def _survives(self) -> Any:
        """A full disk or a missing file costs a record, never the run; said once."""
        try:
            yield
        except OSError as error:
            if not self._broken:
                self._broken = True
                _log.warning("A record of run %s could not be kept: %s", self.run_id, error)

    def _at_exit(self, pid: int) -> None:
        if os.getpid() == pid:  # not in a forked child
            self.finish("FAILED")


def _provenance() -> dict[str, str]:
    """Tags that say what code ran: command, versions, and the commit where the code is a checkout."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("torch", "deepspeed", "diffusers", "webdataset", "mlflow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    tags = {"dpt.version": __version__, "dpt.versions": json.dumps(versions), "dpt.command": " ".join(sys.argv)}
    tags |= {"mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL"}  # what MLflow's pages show
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "rev-parse", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
            tags["mlflow.source.git.commit"] = commit
    return tags
