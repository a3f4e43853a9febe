"""A folder is one run's at a time, whatever becomes of the others."""

import os
import signal
from pathlib import Path

import pytest

from dpt.errors import UserError
from dpt.locking import held


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
