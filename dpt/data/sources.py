"""Where shards come from: folders, brace patterns and URLs, resolved through the manifest beside them; opened, or fetched with
patience for sources that fail or stall."""

import dataclasses
import hashlib
import io
import os
import re
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

from braceexpand import braceexpand

from dpt.data.manifest import MANIFEST_NAME, Manifest, ShardRecord, parse_manifest, read_manifest
from dpt.data.reader import SampleError, ShardReader
from dpt.errors import UserError

T = TypeVar("T")

_TAR_NAME = re.compile(r"[^/\s'\"]+\.tar")
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


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A resolved source: its manifest (of the shards chosen) and the path or URL of each shard."""

    name: str
    manifest: Manifest
    urls: tuple[str, ...]
    verified: set[int] = field(default_factory=set, compare=False)
    """Numbers of the shards that this process has found to be as they were written."""


def resolve(source: str, patience: Patience) -> ShardSet:
    """The shards that `source` names: a folder, a brace pattern of tars, or a URL of either that webdataset opens.

    URLs: `pipe:COMMAND` (its output is the shard), http(s), s3 (through `aws s3 cp`), gs, hf and what else `webdataset.gopen`
    knows. The manifest is read from beside the shards. UserError if something is missing.
    """
    urls = list(braceexpand(source)) if ".tar" in source and not Path(source).is_dir() else []
    tars = [name for url in urls for name in list(_TAR_NAME.finditer(url))[-1:]]
    if len(tars) < len(urls):
        raise UserError(f"{source}: a shard's name must end in .tar; name the tars or their folder.")
    base = source.rstrip("/") if is_url(source) else str(Path(source))
    if not is_url(source):
        manifest = read_manifest(Path(urls[0]).parent if urls else base)
    elif urls:
        beside = urls[0][: tars[0].start()] + MANIFEST_NAME + urls[0][tars[0].end() :]
        manifest = _fetch_manifest(beside, source, patience)
    elif source.startswith("pipe:"):
        raise UserError(f"{source}: name the tars behind a command by a brace pattern such as {{000000..000127}}.tar.")
    else:
        manifest = _fetch_manifest(f"{base}/{MANIFEST_NAME}", source, patience)
    if urls:
        manifest = _choose(manifest, [name.group() for name in tars], source)
    urls = urls or [f"{base}/{shard.name}" for shard in manifest.shards]
    return ShardSet(name=source, manifest=manifest, urls=tuple(urls))


def _choose(manifest: Manifest, names: list[str], source: str) -> Manifest:
    known = {shard.name: shard for shard in manifest.shards}
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"{source}: shard {unknown[0]} is not in the manifest, which ends at {max(known)}; correct the pattern."
        )
    chosen = tuple(known[name] for name in names)
    return dataclasses.replace(manifest, shards=chosen, num_samples=sum(shard.num_samples for shard in chosen))


def _fetch_manifest(url: str, source: str, patience: Patience) -> Manifest:
    def load() -> bytes:
        fetch(url, content := io.BytesIO(), patience)
        return content.getvalue()

    try:
        text = patience.retry(load).decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{source}: no manifest can be fetched from {url} ({error}); check the address.") from error
    return parse_manifest(text, url)


def open_shard(source: ShardSet, number: int, patience: Patience, cache_dir: str = "", *, verify: bool = False) -> ShardReader:
    """Shard `number` of `source`; from a URL as a file in `cache_dir`, taken as it is if it is there, or an unnamed one.

    `verify`: compare its hash with the manifest's, if that has not been done. OSError if it cannot be opened or does not come
    whole, SampleError if it is no tar, or not as it was written.
    """
    record, url = source.manifest.shards[number], source.urls[number]
    if is_url(url):
        file = _fetch_shard(url, record, patience, cache_dir)
    else:
        file = open(url, "rb", buffering=0)  # noqa: SIM115 the reader closes it
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)  # its samples are soon read in random order
    if verify and number not in source.verified:
        _verify(file, record)
        source.verified.add(number)
    return ShardReader(file, url, record, source.manifest.members)


def _verify(file: BinaryIO, record: ShardRecord) -> None:
    """SampleError if the contents are not those of the manifest. Lengths that differ are left to who reads the samples."""
    if os.fstat(file.fileno()).st_size == record.bytes:
        file.seek(0)  # one that was just fetched stands at its end
        found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        if found != record.sha256:
            file.close()
            raise SampleError("its contents are not what was written, by the sha256 in the manifest: some bits have flipped")
    file.seek(0)


def _fetch_shard(url: str, record: ShardRecord, patience: Patience, cache_dir: str) -> BinaryIO:
    kept = Path(cache_dir) / f"{record.sha256[:16]}-{record.name}"
    if cache_dir:
        if kept.is_file() and kept.stat().st_size == record.bytes:
            return kept.open("rb", buffering=0)
        kept.parent.mkdir(parents=True, exist_ok=True)
    file: Any = tempfile.NamedTemporaryFile(dir=cache_dir or None, prefix=".dpt-", suffix=".part", delete=False)  # noqa: SIM115
    try:
        if not cache_dir:
            os.unlink(file.name)  # it goes with the process, however that ends
        fetch(url, file, patience)
        if (found := os.fstat(file.fileno()).st_size) != record.bytes:
            raise OSError(f"{found} of {record.bytes} bytes came")
        if cache_dir:
            Path(file.name).replace(kept)
    except BaseException:
        file.close()
        Path(file.name).unlink(missing_ok=True)
        raise
    return file


def fetch(url: str, file: BinaryIO, patience: Patience) -> None:
    """Copy what `url` gives into `file`. OSError if the source fails, or gives nothing for `stall_s` seconds."""
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
