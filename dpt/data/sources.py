"""Where shards come from: folders, brace patterns and URLs, resolved through the manifest beside them, opened or fetched."""

import dataclasses
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from braceexpand import braceexpand

from dpt.data.fetch import Patience, fetch, is_url
from dpt.data.manifest import MANIFEST_NAME, Manifest, ShardRecord, parse_manifest, read_manifest
from dpt.data.reader import SampleError, ShardReader
from dpt.errors import UserError

_TAR_NAME = re.compile(r"[^/\s'\"]+\.tar")


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A resolved source: its manifest (of the shards chosen) and the path or URL of each shard."""

    name: str
    manifest: Manifest
    urls: tuple[str, ...]


def resolve(source: str, patience: Patience) -> ShardSet:
    """The shards that `source` names: a folder, a brace pattern of tars, or a URL of either that webdataset opens.

    URLs: `pipe:COMMAND` (its output is the shard), http(s), s3 (through `aws s3 cp`), gs, hf and what else `webdataset.gopen`
    knows. The manifest is read from beside the shards. UserError if something is missing.
    """
    urls = list(braceexpand(source)) if ".tar" in source and not Path(source).is_dir() else []
    names = [_TAR_NAME.findall(url)[-1].rsplit("/", 1)[-1] for url in urls if _TAR_NAME.search(url)]
    if len(names) < len(urls):
        raise UserError(f"{source}: a shard's name must end in .tar; name the tars or their folder.")
    if not is_url(source):
        folder = Path(urls[0]).parent if urls else Path(source)
        manifest = read_manifest(folder)
        urls = urls or [str(folder / shard.name) for shard in manifest.shards]
    else:
        if not urls and source.startswith("pipe:"):
            raise UserError(f"{source}: name the tars behind a command by a brace pattern such as {{000000..000127}}.tar.")
        base = source.rstrip("/")
        where = _beside(urls[0]) if urls else f"{base}/{MANIFEST_NAME}"
        manifest = _fetch_manifest(where, source, patience)
        urls = urls or [f"{base}/{shard.name}" for shard in manifest.shards]
    return ShardSet(name=source, manifest=_choose(manifest, names, source), urls=tuple(urls))


def _beside(url: str) -> str:
    """The URL (or command) with the shard's name replaced by the manifest's."""
    last = list(_TAR_NAME.finditer(url))[-1]
    return url[: last.start()] + MANIFEST_NAME + url[last.end() :]


def _choose(manifest: Manifest, names: list[str], source: str) -> Manifest:
    if not names:
        return manifest
    known = {shard.name: shard for shard in manifest.shards}
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"{source}: shard {unknown[0]} is not in the manifest, which ends at {max(known)}; correct the pattern."
        )
    chosen = tuple(known[name] for name in names)
    return dataclasses.replace(manifest, shards=chosen, num_samples=sum(shard.num_samples for shard in chosen))


def _fetch_manifest(url: str, source: str, patience: Patience) -> Manifest:
    def load() -> bytes:
        with tempfile.TemporaryFile() as file:
            fetch(url, file, patience)
            file.seek(0)
            return file.read()

    try:
        content = patience.retry(load)
    except OSError as error:
        raise UserError(f"{source}: no manifest can be fetched from {url} ({error}); check the address.") from error
    return parse_manifest(content.decode("utf-8", errors="replace"), url)


def open_shard(source: ShardSet, number: int, patience: Patience, cache_dir: str = "") -> ShardReader:
    """Shard `number` of `source`; from a URL as a file in `cache_dir`, taken as it is if it is there, or an unnamed one.

    OSError if it cannot be opened or does not come whole, SampleError if it is no tar.
    """
    record, url = source.manifest.shards[number], source.urls[number]
    if is_url(url):
        file = _fetch_shard(url, record, patience, Path(cache_dir) if cache_dir else None)
    else:
        file = open(url, "rb", buffering=0)  # noqa: SIM115 the reader owns it
        if hasattr(os, "posix_fadvise"):  # its samples are soon read in random order
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    try:
        return ShardReader(file, url, record, source.manifest.members)
    except (OSError, SampleError):
        file.close()
        raise


def _fetch_shard(url: str, record: ShardRecord, patience: Patience, cache: Path | None) -> BinaryIO:
    if cache is None:
        file: Any = tempfile.TemporaryFile(prefix="dpt-shard-")  # noqa: SIM115 open as long as it is read
    else:
        kept = cache / f"{record.sha256[:16]}-{record.name}"
        if kept.is_file() and kept.stat().st_size == record.bytes:
            return kept.open("rb", buffering=0)
        cache.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=cache, prefix=".", suffix=".part", delete=False)  # noqa: SIM115 likewise
    try:
        fetch(url, file, patience)
        if (found := os.fstat(file.fileno()).st_size) != record.bytes:
            raise OSError(f"{found} of {record.bytes} bytes came")
        if cache is not None:
            Path(file.name).replace(kept)
    except BaseException:
        file.close()
        if cache is not None:
            Path(file.name).unlink(missing_ok=True)
        raise
    return file
