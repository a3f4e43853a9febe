"""What paths and URLs give, with patience for sources that fail or stall."""

import os
import select
import shlex
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar

T = TypeVar("T")

_CHUNK_BYTES = 1 << 20
_LOOK_EVERY_MS = 100


class Stopped(Exception):
    """The work was given up because nobody waits for it any more."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a failing source is tried."""

    retries: int = 3
    wait_s: float = 1.0
    """Pause before the first retry; it doubles each time."""
    stall_s: float = 60.0
    """Seconds without a byte after which a fetch counts as failed."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Once set, attempts and fetches end at once with `Stopped`."""

    def retry(self, action: Callable[[], T]) -> T:
        """`action()`, tried again after a pause while it raises OSError; the last error is raised."""
        for attempt in range(self.retries + 1):
            if self.stop.is_set():
                raise Stopped
            try:
                return action()
            except OSError:
                if attempt == self.retries:
                    raise
            self.stop.wait(self.wait_s * 2**attempt)
        raise AssertionError


def is_url(source: str) -> bool:
    """Whether `source` is opened by a command or over a network rather than as a local path."""
    return source.startswith("pipe:") or "://" in source


def fetch(url: str, file: BinaryIO, patience: Patience) -> None:
    """Copy what `url` gives into `file`. OSError if the source fails, or gives nothing for `stall_s` seconds."""
    try:
        _copy(url, file, patience)
    except Stopped:
        raise
    except Exception as error:  # handlers of URLs raise what they like
        raise OSError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    file.flush()


def _copy(url: str, file: BinaryIO, patience: Patience) -> None:
    from webdataset import gopen

    source = gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url, "rb", bufsize=0)
    descriptor = getattr(source, "stream", source).fileno()
    poll, last = select.poll(), time.monotonic()
    poll.register(descriptor, select.POLLIN)
    try:
        while True:
            if patience.stop.is_set():
                raise Stopped
            if poll.poll(_LOOK_EVERY_MS):
                if not (chunk := os.read(descriptor, _CHUNK_BYTES)):
                    break
                file.write(chunk)
                last = time.monotonic()
            elif time.monotonic() - last > patience.stall_s:
                raise TimeoutError(f"nothing came for {patience.stall_s:g} s")
    except BaseException:
        if (process := getattr(source, "proc", None)) is not None:
            process.kill()
        with suppress(OSError):  # killed
            source.close()
        raise
    source.close()  # raises if the command failed
