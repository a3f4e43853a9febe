"""Locks between processes: a folder is one run's at a time, as a second would take its files for its own; turns at a file."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dpt import distributed
from dpt.errors import UserError, file_problem

_NAME = ".running"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `folder`, created if missing, within the context. UserError, on all ranks, if another run holds it. Collective.

    The lock ends with the process, however that ends. On file systems without locks nothing is held.
    """
    descriptor, made = -1, False
    with distributed.shared_errors():
        if distributed.is_main():
            made = not folder.exists()
            descriptor = _lock(folder)
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                if os.listdir(folder) == [_NAME]:  # a refused run leaves nothing behind
                    (folder / _NAME).unlink()
                    folder.rmdir()
        if descriptor >= 0:  # not earlier, or another run that took the lock would lose its file
            os.close(descriptor)


@contextlib.contextmanager
def taking_turns(file: Path) -> Iterator[None]:
    """Hold the lock `file`, made if missing, within the context, after waiting for other processes that do.

    On file systems without locks nothing is held.
    """
    with file.open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock(folder: Path) -> int:
    """Open the lock file and lock it; returns its descriptor."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(file_problem(error) or f"{folder}: cannot be written ({error}).") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        said = os.pread(descriptor, 1000, 0)
        os.close(descriptor)
        sentence = f"{folder}: another run is using it ({_owner(said)}); wait until it ends, or choose another folder."
        raise UserError(sentence) from error
    except OSError:  # a file system without locks
        return descriptor
    if os.fstat(descriptor).st_nlink == 0:  # removed meanwhile by a refused run
        os.close(descriptor)
        return _lock(folder)
    with contextlib.suppress(OSError):  # the owner, only for the message
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode(), 0)
    return descriptor


def _owner(said: bytes) -> str:
    try:
        found = json.loads(said)
        return f"process {found['process']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not said who it is"
