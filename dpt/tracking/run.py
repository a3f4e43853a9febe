"""The training side of tracking: cheap appends to the spool; a child process (`dpt.tracking.sender`) talks to MLflow.

A process rather than a thread: the training process never imports MLflow nor shares an interpreter lock with it; if it is
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
    """Start (or resume) a run's record; returns a Run that records nothing if tracking is off or on ranks other than 0.

    `stage` is "pretrain", "finetune", "upcycle" or "evaluate"; `name` is used unless the recipe names the run. `params` is the
    resolved recipe: nested, recorded flat under the dotted names of the command line and whole as the artifact `recipe.json`.
    `parents` are the run ids of the runs whose weights this one starts from. With `resume_run_id` the same run is resumed, and
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
    run = Run(Spool(Path(output_dir) / "tracking", resume_run_id or uuid.uuid4().hex), past_step)
    run.begin(
        params,
        uri=uri,
        experiment=config.experiment,
        name=config.run_name or name,
        stage=stage,
        parents=[p for p in parents if p],
        tags={**_provenance(), **config.tags, **{k: str(v) for k, v in tags.items()}},
    )
    if not config.offline:
        run.start_sender(uri, config.system_every, _node())
    return run


def watch_node(config: TrackingConfig, *, run_id: str, output_dir: Path) -> "Run":
    """Sample this node for the run, from one rank, if it is not the run's first; otherwise return a Run that does nothing.

    `run_id`: our id of the run that rank 0 has started. Call `finish` when the training ends.
    """
    local_rank, rank = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "RANK"))
    if not config.enabled or config.offline or not config.system_every or not run_id or local_rank or not rank:
        return Run()
    uri, node = absolute_uri(config.uri), _node()
    run = Run(Spool(Path(output_dir) / "tracking", run_id, node))
    run.record("join", uri=uri, experiment=config.experiment)
    run.start_sender(uri, config.system_every, node)
    return run


def _node() -> str:
    """This node's name among several; empty for a run on one node."""
    local_ranks = distributed.local_world_size()
    several = local_ranks < int(os.environ.get("WORLD_SIZE", "1"))
    return f"node_{int(os.environ.get('RANK', '0')) // local_ranks}" if several else ""


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested objects to {"a.b": "text"}; lists and other values as JSON, strings unchanged."""
    flat: dict[str, str] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


class Run:
    """A run whose records go to a spool, with a sender beside it; without a spool it records nothing.

    As a context manager it finishes itself (after an exception as FAILED).
    """

    def __init__(self, spool: Spool | None = None, past_step: int = -1) -> None:
        self.run_id = "" if spool is None else spool.run_id
        """Our id of the run, known before any server answers; the tag `dpt.run_id` in MLflow. Empty: not recorded."""
        self._spool = spool
        self._past_step = past_step
        self._last_steps = {} if spool is None else spool.last_steps()
        self._sender: subprocess.Popen[bytes] | None = None
        self._finished = False
        self._broken = False
        self._next_check = time.monotonic() + _NOTICE_SECONDS
        if spool is not None:
            atexit.register(self._at_exit, os.getpid())

    def begin(self, recipe: Mapping[str, Any], **start: Any) -> None:
        """Write the first records: the start, the parameters, and the recipe as an artifact."""
        self.record("start", **start)
        self.record("params", values=flatten({k: v for k, v in recipe.items() if k != "dpt"} | recipe.get("dpt", {})))
        with self._survives(), tempfile.TemporaryDirectory() as folder:
            recipe_path = Path(folder) / "recipe.json"
            recipe_path.write_text(hide_passwords(json.dumps(recipe, indent=2, default=str)))
            self.log_artifact(recipe_path)

    def start_sender(self, uri: str, every: float, node: str) -> None:
        """Start the process that sends the records to `uri` and samples this node (`node`) every `every` seconds (0: never)."""
        assert self._spool is not None
        with self._survives():
            self._sender = subprocess.Popen(  # gets a password in its environment, not in the records
                [sys.executable, "-m", "dpt.tracking.sender", str(self._spool.path.absolute()), str(every), node],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {SECRET: uri},
            )

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step. A name's steps only increase: others are dropped."""
        values = {}
        for key, value in metrics.items() if self._spool is not None else ():
            name = _UNFIT.sub("_", key)
            if step > max(self._past_step, self._last_steps.get(name, self._past_step)):
                self._last_steps[name] = step
                values[name] = float(value)
        if values:
            self.record("metrics", step=int(step), values=values)

    def log_picture(self, path: str | Path, name: str, step: int | None = None) -> None:
        """Keep a picture as artifact `pictures/NAME.png` or, with a step, `pictures/NAME_STEP.png` (the file's own suffix)."""
        suffix = Path(path).suffix or ".png"
        self._keep(Path(path), "pictures", (name if step is None else f"{name}_{step:08d}") + suffix)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Keep a file or folder as an artifact, below `folder`. Folders, and files over 32 MiB, must stay until sent."""
        self._keep(Path(path), folder, Path(path).name)

    def register_model(self, path: str | Path, name: str, tags: Mapping[str, str] | None = None) -> None:
        """Register exported weights in the model registry as a version of `name`; their folder stays where it is.

        `tags` are shown there, such as the stage and the metrics.
        """
        self.record("model", path=str(Path(path).absolute()), name=name, tags={k: str(v) for k, v in (tags or {}).items()})

    def log_dataset(
        self, name: str, *, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Record a data set as an input of the run. `source`: its folder or URL; `context`: "training" or "evaluation";
        `profile`: its summary on MLflow's page."""
        place = source if "://" in source else str(Path(source).absolute())
        self.record("dataset", name=name, digest=digest, source=place, context=context, profile=dict(profile or {}))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run."""
        self.record("tags", values={k: str(v) for k, v in tags.items()})

    def finish(self, status: str = "FINISHED") -> None:
        """End the run ("FINISHED", "FAILED" or "KILLED") and wait, within limits, until all is sent."""
        if self._finished or self._spool is None:
            return
        if not self._spool.joins:
            self.record("finish", status=status)
        self._finished = True
        self._spool.close()
        if self._sender is None or self._sender.stdin is None:
            return
        self._sender.stdin.close()
        self._wait(self._sender, self._spool)
        unsent, state = self._spool.unsent, self._spool.state
        if state.rejected:
            _log.warning("MLflow refused records of run %s for good (%d): %s.", self.run_id, state.rejected, self._spool.log)
        if unsent:
            _log.warning(
                "%d records of run %s have not reached MLflow (%s); they are kept: `dpt sync %s` sends them.",
                unsent, self.run_id, state.error or "still sending", self._spool.folder.parent,
            )  # fmt: skip

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.finish("KILLED" if killed else "FAILED" if kind is not None else "FINISHED")

    def _wait(self, sender: "subprocess.Popen[bytes]", spool: Spool) -> None:
        """Wait until all is sent; not for long if the store has failed, as the sender then ends by itself."""
        begun, told = time.monotonic(), False
        while sender.poll() is None and (waited := time.monotonic() - begun) < _FINISH_SECONDS:
            if waited > _TOLD_SECONDS and not told and (unsent := spool.unsent):
                told = True
                _log.warning("Sending the last %d records of run %s to MLflow.", unsent, self.run_id)
            if waited > _FAILED_SECONDS and spool.state.error:
                return
            time.sleep(0.05)

    def _keep(self, path: Path, folder: str, name: str) -> None:
        if self._spool is not None:
            with self._survives():
                self.record("artifact", path=str(self._spool.keep_file(path, name)), folder=folder)

    def record(self, kind: str, **content: Any) -> None:
        """Append a record to the spool; occasionally warn if records do not arrive."""
        if self._spool is None:
            return
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
        """Let a full disk or a missing file cost a record, never the run; reported once."""
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
    """Tags that identify the code: command, versions, and the commit if the code is a checkout."""
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
