"""A folder is one run's at a time, whatever becomes of the others."""

import fcntl
import os
import signal
from pathlib import Path

import pytest

from dpt.errors import UserError
from dpt.locking import held, taking_turns


def test_the_second_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = rf"run: another run is using it \(process {os.getpid()} on "
    with held(folder), pytest.raises(UserError, match=words), held(folder):
        pass
    with held(folder):
        pass


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    ready, told = os.pipe()
    if (child := os.fork()) == 0:
        with held(tmp_path):
            os.write(told, b"x")
            signal.pause()
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(UserError, match=f"process {child} on"), held(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with held(tmp_path):
        pass


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file.*: cannot be read or written"), held(folder):
            pass


def test_the_lock_of_a_run_that_was_refused_meanwhile_is_not_taken_for_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes its file, which another run may just have opened: a third one would find none."""
    lock = fcntl.flock

    def lock_late(descriptor: int, how: int) -> None:
        monkeypatch.undo()
        (tmp_path / ".running").unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with held(tmp_path), pytest.raises(UserError, match="another run is using it"), held(tmp_path):
        pass


def test_a_refused_run_keeps_its_lock_until_its_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, close = list[bool](), os.close

    def close_then_look(descriptor: int) -> None:
        close(descriptor)
        closed.append((tmp_path / "run").exists())

    with held(tmp_path / "run"):
        monkeypatch.setattr(os, "close", close_then_look)
    monkeypatch.undo()
    assert closed == [False]


def test_turns_are_taken_one_after_another(tmp_path: Path) -> None:
    """Two processes add to a number that each reads first: no addition is lost."""
    number = tmp_path / "number"
    number.write_text("0")
    if (child := os.fork()) == 0:
        _add(number)
        os._exit(0)
    _add(number)
    assert os.waitpid(child, 0)[1] == 0
    assert number.read_text() == "400"


def _add(number: Path) -> None:
    for _ in range(200):
        with taking_turns(number.with_suffix(".lock")):
            number.write_text(str(int(number.read_text()) + 1))
