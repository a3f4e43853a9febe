"""Studies run on this machine: only what is missing, in the order that weights need, side by side, each on its share."""

import dataclasses
import json
import shutil
import sys
import threading
import time

import pytest

from dpt.errors import UserError
from dpt.scaling import launching, processes, running, side_by_side
from dpt.scaling.launching import pending
from dpt.scaling.processes import start_forked
from dpt.scaling.running import run_here

LAUNCH = """
import json, os, pathlib, sys, time
name, result, weights, log, seconds = sys.argv[1], *map(pathlib.Path, sys.argv[2:5]), float(sys.argv[5])
assert (weights / "config.json").exists(), "the weights are not there yet"
began = time.monotonic()
time.sleep(seconds)
result.parent.mkdir(exist_ok=True, parents=True)
result.write_text("{}")
variables = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
with open(log, "a") as file:
    file.write(json.dumps({"name": name, "began": began, "ended": time.monotonic()} | variables) + "\\n")
"""
FAIL = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]


def quiet(text):
    """Says nothing."""


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """Commands that leave a launch's result, and what they have seen."""
    log = tmp_path / "log"
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.json").touch()
    settings = {"seconds": 0.0, "failing": "", "devices": 0, "words": []}

    def command(launch, num_devices=None, port=None):
        settings["words"].append((num_devices, port))
        if launch.name == settings["failing"]:
            return FAIL
        weights = launch.fields.get("training.weights") or launch.fields.get("evaluation.weights") or str(tmp_path / "first")
        words = (launch.name, launch.result, weights, log, settings["seconds"])
        return [sys.executable, "-IS", "-c", LAUNCH, *map(str, words)]

    monkeypatch.setattr(running, "command", command)
    monkeypatch.setattr(side_by_side, "_POLL_S", 0.02)
    monkeypatch.setattr(running, "count_devices", lambda: settings["devices"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    settings["seen"] = lambda: [json.loads(line) for line in log.read_text().splitlines()]
    return settings


def test_only_what_is_missing_runs_and_changed_commands_are_refused(write_study, launches):
    study, lines = write_study(), []
    run_here([study], say=lines.append)
    assert pending(study) == []
    assert lines[0].startswith("[1/10] pretrain_w64\n  $ ")
    assert "1 of 10 done, about" in lines[1]
    study.launches[3].result.unlink()
    lines.clear()
    run_here([study], say=lines.append)
    expected = [launch.name for launch in study.launches]
    assert [one["name"] for one in launches["seen"]()] == [*expected, expected[3]]
    assert lines[0].startswith("[1/1] depth_w64_long")
    with pytest.raises(UserError, match="made by another command"):
        pending(write_study("training.steps: 50", "training.steps: 60"))


def test_studies_that_share_a_folder_keep_each_others_records(write_study, monkeypatch):
    study, read, others = write_study(), launching._read_record, []

    def read_slowly(study):
        found = read(study)
        if not others:
            others.append(threading.Thread(target=launching.record, args=(study, study.launches[1])))
            others[0].start()
            others[0].join(timeout=0.5)  # it has to wait
        return found

    monkeypatch.setattr(launching, "_read_record", read_slowly)
    launching.record(study, study.launches[0])
    others[0].join()
    assert read(study).keys() == {launch.name for launch in study.launches[:2]}


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_failure_is_said_and_the_rest_waits(write_study, launches, jobs):
    study = write_study()
    launches["failing"] = "pretrain_w96"
    with pytest.raises(UserError, match="pretrain_w96 ended with exit code 3"):
        run_here([study], jobs=jobs, say=quiet)
    assert (study.launches[1].folder / "log.txt").read_text() == "the reason\n"
    left = {launch.name for launch in pending(study)}
    assert left >= {launch.name for launch in study.launches if "w96" in launch.name}
    assert "pretrain_w64" not in left
    assert jobs > 1 or len(left) == 9
    for launch in study.launches:  # nothing was cut off: what began has its result
        assert not launch.folder.exists() or launch.result.exists() or launch.name == "pretrain_w96"


def test_side_by_side_launches_overlap_and_wait_for_their_weights(write_study, launches, monkeypatch):
    monkeypatch.setattr(running.os, "cpu_count", lambda: 8)
    launches["seconds"] = 0.3
    study = write_study()
    run_here([study], jobs=4, say=quiet)
    assert pending(study) == []
    seen = launches["seen"]()
    events = [event for one in seen for event in ((one["began"], 1), (one["ended"], -1))]
    level = most = 0
    for _, step in sorted(events):
        level += step
        most = max(most, level)
    assert 2 <= most <= 4
    assert {one["OMP_NUM_THREADS"] for one in seen} == {"2"}


def test_devices_are_shared_out(write_study, launches, monkeypatch):
    launches["devices"] = 5
    ports = iter([20001, 20001, 20002])
    monkeypatch.setattr(running, "free_port", lambda: next(ports))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3")
    run_here([write_study()], jobs=2, say=quiet)
    assert {one["CUDA_VISIBLE_DEVICES"] for one in launches["seen"]()} == {"7,6", "5,4"}
    assert set(launches["words"]) == {(2, 20001), (2, 20002)}  # free ones, apart
    launches["devices"], ports = 1, iter([20001, 20002])
    with pytest.raises(UserError, match=r"--jobs 2: this machine has 1 devices"):
        run_here([], jobs=2, say=quiet)
    with pytest.raises(UserError, match=r"--jobs 0: it must be at least 1"):
        run_here([], jobs=0, say=quiet)


def test_several_studies_run_as_one_and_must_agree(write_study, launches):
    study = write_study()
    shorter = dataclasses.replace(study, launches=study.launches[:3])
    run_here([shorter, study], say=quiet)
    assert len(launches["seen"]()) == 10
    other = write_study("training.steps: 5}", "training.steps: 6}")
    shutil.rmtree(study.output)
    with pytest.raises(UserError, match=r"ask for different launches in .*depth_w64_short"):
        run_here([study, other], say=quiet)
    assert not study.output.exists()


SCRIPT = """
import atexit, os, sys, time
atexit.register(print, "at exit")
print(__name__, sys.argv[1:], os.environ.get("MADE"), "torch" in sys.modules, flush=True)
if sys.argv[1] == "sleep":
    time.sleep(60)
raise SystemExit(int(sys.argv[1]))
"""


def test_forked_launches_are_as_new_interpreters(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_LIBRARIES", ["torch"])  # the others take seconds
    script, logs = tmp_path / "script.py", [tmp_path / f"{number}.txt" for number in range(3)]
    script.write_text(SCRIPT)
    environment = {"PATH": "", "OMP_NUM_THREADS": "1"}
    made = [
        start_forked(["python", str(script), word], log, environment | {"MADE": word})
        for word, log in zip(("0", "3", "sleep"), logs, strict=True)
    ]
    for process in made[:2]:
        process.wait()
    assert [process.exit_code() for process in made[:2]] == [0, 3]
    assert [log.read_text() for log in logs[:2]] == [f"__main__ ['{word}'] {word} True\nat exit\n" for word in ("0", "3")]
    assert made[2].exit_code() is None
    made[2].terminate()
    made[2].wait()
    assert made[2].exit_code() < 0


def test_an_interruption_ends_the_launches_too(write_study, launches):
    launches["seconds"] = 60.0

    def interrupt(text):
        raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_here([write_study()], say=interrupt)
    assert time.monotonic() - begun < 30
    assert not (write_study().output / "pretrain_w64" / "weights").exists()


def test_the_launcher_of_deepspeed_is_used_from_two_devices_on(write_study):
    launch = write_study().launches[0]
    assert launching.command(launch, num_devices=1)[:2] == ["python", "launchers/pretrain.py"]
    assert launching.command(launch, num_devices=2, port=7)[:4] == ["deepspeed", "--master_port", "7", "launchers/pretrain.py"]
