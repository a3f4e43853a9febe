"""Downloads to files, retried when a source fails or stalls."""

import io
import os
import select
import shlex
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")

_CHUNK_BYTES = 1 << 20
_LOOK_EVERY_MS = 100


class Stopped(Exception):
    """The work was abandoned because nobody waits for it any more."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to retry a failing source."""

    retries: int = 3
    wait_s: float = 1.0
    """Pause before the first retry; it doubles each time."""
    stall_s: float = 60.0
    """Seconds without a byte after which a fetch counts as failed."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Once set, attempts and fetches end at once with `Stopped`."""

    def retry(self, action: Callable[[], T]) -> T:
        """Call `action()`, retrying after a pause while it raises OSError; the last error is raised."""
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
    """Copy the content of `url` into `file`. OSError if the source fails, or sends nothing for `stall_s` seconds.

    URLs: `pipe:COMMAND` (its output), http(s), s3 (through `aws s3 cp`), gs, hf and others that `webdataset.gopen` supports.
    """
    from webdataset import gopen

    try:
        source = gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url, "rb", bufsize=0)
        try:
            _copy(getattr(source, "stream", source).fileno(), file, patience)
        except BaseException:
            if (process := getattr(source, "proc", None)) is not None:
                process.kill()
            with suppress(OSError):  # killed
                source.close()
            raise
        source.close()  # raises if the command failed
    except Stopped:
        raise
    except Exception as error:  # handlers of URLs raise what they like
        raise OSError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    file.flush()


def fetch_text(url: str, patience: Patience) -> str:
    """Return the text at `url`, with retries. OSError if it cannot be fetched."""

    def attempt() -> bytes:
        fetch(url, content := io.BytesIO(), patience)
        return content.getvalue()

    return patience.retry(attempt).decode("utf-8", errors="replace")


def fetch_file(url: str, size: int, patience: Patience, kept: Path | None = None) -> BinaryIO:
    """Fetch `url` and return an open file: `kept` (used as is if it exists) or an unnamed one.

    OSError if it cannot be fetched, or is not `size` bytes long.
    """
    if kept is not None:
        if kept.is_file() and kept.stat().st_size == size:
            return kept.open("rb", buffering=0)
        kept.parent.mkdir(parents=True, exist_ok=True)
    folder = kept.parent if kept is not None else None
    file: Any = tempfile.NamedTemporaryFile(dir=folder, prefix=".dpt-", suffix=".part", delete=False)  # noqa: SIM115
    try:
        if kept is None:
            os.unlink(file.name)  # the file is gone when the process ends, however that happens
        fetch(url, file, patience)
        if (found := os.fstat(file.fileno()).st_size) != size:
            raise OSError(f"{found} of {size} bytes came")
        if kept is not None:
            Path(file.name).replace(kept)
    except BaseException:
        file.close()
        Path(file.name).unlink(missing_ok=True)
        raise
    return file


def _copy(descriptor: int, file: BinaryIO, patience: Patience) -> None:
    poll, last = select.poll(), time.monotonic()
    poll.register(descriptor, select.POLLIN)
    while not patience.stop.is_set():
        if poll.poll(_LOOK_EVERY_MS):
            if not (chunk := os.read(descriptor, _CHUNK_BYTES)):
                return
            file.write(chunk)
            last = time.monotonic()
        elif time.monotonic() - last > patience.stall_s:
            raise TimeoutError(f"nothing came for {patience.stall_s:g} s")
    raise Stopped
