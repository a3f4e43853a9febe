"""What paths and URLs give, with patience for sources that fail or stall."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a failing source is tried."""

    retries: int = 3
    wait_s: float = 1.0
    """Pause before the first retry; it doubles each time."""
    stall_s: float = 60.0
    """Seconds without a byte after which a fetch counts as failed."""


def is_url(source: str) -> bool:
    """Whether `source` is opened by a command or over a network rather than as a local path."""
    return source.startswith("pipe:") or "://" in source


def retry(action: Callable[[], Any], patience: Patience) -> Any:
    """`action()`, tried again after a pause while it raises OSError; the last error is raised."""
    for attempt in range(patience.retries + 1):
        try:
            return action()
        except OSError:
            if attempt == patience.retries:
                raise
            time.sleep(patience.wait_s * 2**attempt)
    raise AssertionError


class Fetch:
    """Copies what a URL gives into `file`, in a thread of its own."""

    def __init__(self, url: str, file: BinaryIO) -> None:
        self._url, self.file = url, file
        self._error: Exception | None = None
        self._stream: Any = None
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"fetch {url}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        from webdataset import gopen

        try:
            self._stream = gopen(self._url, "rb", bufsize=1 << 20)
            while chunk := self._stream.read(1 << 20):
                self.file.write(chunk)
                self._last = time.monotonic()
            self._stream.close()  # raises if the command failed
        except Exception as error:  # handlers raise what they like; `wait` makes it an OSError
            self._error = error

    def abandon(self) -> None:
        """Stop the command, if there is one, and take no notice of what still comes."""
        if (process := getattr(self._stream, "proc", None)) is not None:
            process.kill()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, stall_s: float) -> BinaryIO:
        """The filled file. OSError if the source failed, or gave nothing for `stall_s` seconds."""
        while not self.done:
            self._thread.join(timeout=max(0.0, min(1.0, stall_s)))
            if not self.done and time.monotonic() - self._last > stall_s:
                self.abandon()
                raise TimeoutError(f"nothing came for {stall_s:g} s")
        if self._error is not None:
            raise OSError(" ".join(str(self._error).split())[:200] or type(self._error).__name__)
        self.file.flush()
        return self.file
