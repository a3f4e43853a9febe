"""Faults done to runs, seeded and bounded: what docs/reliability.md promises of each. Run by `make test-all`."""

import contextlib
import http.server
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chaos_runs import HOST, PATIENCE_S, Run
from safetensors.torch import load_file

from dpt import distributed
from dpt.config.sections import TrackingConfig
from dpt.tracking import start_run
from dpt.tracking.run import _FINISH_SECONDS
from dpt.tracking.sender import sync
from dpt.tracking.spool import Spool
from dpt.training.checkpoint import find_checkpoints, newest_checkpoint, step_of

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from training_toys import make_recipe, make_shards, records

pytestmark = pytest.mark.slow
KILLS = 12
STEPS = 60


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path / "run.json", [make_shards(tmp_path / "shards")], steps=STEPS, checkpoint_every=1)


def newest(run: Path) -> int:
    found = find_checkpoints(run / "checkpoints")
    return step_of(found[0]) if found else 0


def test_killed_ranks(recipe: Path, tmp_path: Path) -> None:
    """kill -9 of one rank or of all, at random moments of a run that saves after every step."""
    whole = tmp_path / "whole"
    assert Run(2, recipe, {"training.output_dir": str(whole)}, tmp_path / "words").wait() == [0, 0]
    killed, chance = tmp_path / "killed", random.Random(0)
    fields = {"training.output_dir": str(killed)}
    for _ in range(KILLS):
        before = newest(killed)
        run = Run(2, recipe, fields, tmp_path / "words")
        deadline = time.monotonic() + PATIENCE_S
        while newest(killed) < before + 1 and not run.ended and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.1))
        victims = chance.choice([(0,), (1,), (0, 1)])
        alive = not run.ended
        run.send(signal.SIGKILL, *victims)
        codes = run.wait()
        if alive:
            assert all(codes[rank] in (-9, 1, 0) for rank in range(2)), codes
        found = newest_checkpoint(killed / "checkpoints")
        assert found is not None
        assert found[1]["step"] >= before
    assert Run(2, recipe, fields, tmp_path / "words").wait() == [0, 0]
    expected, weights = (load_file(folder / "weights" / "weights.safetensors") for folder in (whole, killed))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert [record["step"] for record in records(killed)] == list(range(1, STEPS + 1))


def test_a_frozen_rank_ends_the_run_by_name_and_it_goes_on_later(recipe: Path, tmp_path: Path) -> None:
    fields = {"training.steps": 1_000_000, "training.timeout_s": 20.0}
    run = Run(2, recipe, fields, tmp_path / "words")
    run.wait_for("step 6/")  # checkpoints are there by then
    run.send(signal.SIGSTOP, 1)
    run.wait_for(f"rank 1 ({HOST}) made no progress for 20 s")
    run.send(signal.SIGKILL, 1)
    assert run.wait() == [1, -9]
    before = newest(recipe.with_suffix(""))
    assert before >= 1
    again = Run(2, recipe, {"training.steps": before + 2}, tmp_path / "words")
    assert again.wait() == [0, 0]
    assert "Continuing from" in again.text(0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_save_and_say_so(recipe: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = Run(2, recipe, {"training.steps": 1_000_000, "training.checkpoint_every": 0}, tmp_path / "words")
    run.wait_for("step 2/")
    run.send(number)
    assert run.wait() == [0, 0]
    assert f"by {number.name}; the same command continues." in run.text(0)
    assert newest(recipe.with_suffix("")) >= 2
    assert ("Interrupted: the run is saved after this step" in run.text(1)) == (number == signal.SIGINT)


def test_the_second_run_in_a_folder_is_refused_and_the_first_goes_on(recipe: Path, tmp_path: Path) -> None:
    first = Run(2, recipe, {"training.steps": 1_000_000}, tmp_path / "first")
    first.wait_for("step 2/")
    second = Run(2, recipe, {}, tmp_path / "second")
    assert second.wait() == [2, 2]
    assert "another run is using it (process " in second.text(0)
    first.send(signal.SIGTERM, 0)
    assert first.wait() == [0, 0]
    third = Run(2, recipe, {"training.steps": newest(recipe.with_suffix("")) + 1}, tmp_path / "third")
    assert third.wait() == [0, 0]


def test_an_output_folder_that_cannot_be_is_one_sentence(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = Run(2, recipe, {"training.output_dir": str(tmp_path / "file" / "run")}, tmp_path / "words")
    assert run.wait() == [2, 2]
    assert "pretrain: error: " in run.text(0)
    assert "cannot be read or written" in run.text(0)
    assert "Traceback" not in run.text(0) + run.text(1)


def test_checkpoints_that_cannot_be_written_for_a_while_do_not_end_the_run(recipe: Path, tmp_path: Path) -> None:
    """The folder of checkpoints is gone and something else is in its place, as after a failing mount."""
    folder = recipe.with_suffix("") / "checkpoints"
    run = Run(2, recipe, {"training.steps": 1_000_000}, tmp_path / "words")
    run.wait_for("step 3/")
    with contextlib.suppress(OSError):
        shutil.move(folder, tmp_path / "aside")
    folder.with_name("checkpoints").write_text("") if not folder.exists() else None
    run.wait_for("was not written")
    run.send(signal.SIGTERM, 1)
    codes = run.wait()
    assert codes in ([0, 0], [1, 1])
    assert "Traceback" not in run.text(0) + run.text(1)


class Faulty(http.server.BaseHTTPRequestHandler):
    """A server in place of MLflow: "refuse" asks for a password, "break" fails, "hang" never answers, "cut" hangs up."""

    def do_GET(self) -> None:
        fault = self.server.fault  # type: ignore[attr-defined]
        if fault == "hang":
            time.sleep(3600)
        if fault != "cut":
            self.send_response(401 if fault == "refuse" else 500)
            self.send_header("Content-Length", "0")
            self.end_headers()
        self.close_connection = True

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def faulty(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a faulty server; "dead": of none."""
    port = distributed.free_port()
    if request.param == "dead":
        yield f"http://127.0.0.1:{port}"
        return
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Faulty)
    server.daemon_threads = True
    server.fault = request.param  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{port}"
    server.shutdown()


@pytest.mark.parametrize("faulty", ["dead", "refuse", "break", "hang", "cut"], indirect=True)
def test_a_tracking_server_that_fails_costs_neither_the_run_nor_its_records(
    faulty: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    output = tmp_path / "run"
    config = TrackingConfig(uri=faulty, experiment="e")
    begin = time.monotonic()
    params = {"dpt": {"tracking": {"uri": faulty}}}
    with start_run(config, stage="pretrain", name="n", params=params, parents=[], output_dir=output, tags={"a": faulty}) as run:
        for step in range(3):
            run.log_metrics({"train/loss": 1.0 / (step + 1)}, step)
    assert time.monotonic() - begin < _FINISH_SECONDS  # it does not wait as for a store that is slow: this one has failed
    (spool,) = Spool.find(output)
    assert spool.unsent
    said = caplog.text + "".join(capfd.readouterr())
    assert "are kept" in said
    written = b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())
    assert b"secret" not in written
    assert "secret" not in said
    deadline = time.monotonic() + PATIENCE_S
    while spool.unsent and time.monotonic() < deadline:  # the run's own sender gives up a little later than the run
        sync(output, uri=f"sqlite:///{tmp_path}/mlflow.db")
        time.sleep(1.0)
    assert not spool.unsent
