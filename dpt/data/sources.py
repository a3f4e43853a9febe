"""Resolve sources of shards (folders, brace patterns and URLs) through the manifest beside them; open or fetch the shards."""

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from braceexpand import braceexpand

from dpt.data.manifest import MANIFEST_NAME, Manifest, parse_manifest, read_manifest
from dpt.data.reader import SampleError, ShardReader
from dpt.errors import UserError
from dpt.urls import Patience, fetch_file, fetch_text, is_url

_TAR = re.compile(r"(.*[/\s'\"]|)([^/\s'\"]+\.tar)(.*)", re.DOTALL)
"""A shard's path, URL or command: what precedes its name, the name, and what follows."""


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A resolved source: its manifest (of the selected shards) and each shard's path or URL."""

    name: str
    manifest: Manifest
    urls: tuple[str, ...]
    verified: set[int] = field(default_factory=set, compare=False)
    """Numbers of the shards that this process has found unchanged."""


def resolve(source: str, patience: Patience) -> ShardSet:
    """Resolve `source` to shards: a folder, a brace pattern of tars, or a URL of either (`urls.fetch`).

    The manifest is beside the shards. UserError if something is missing.
    """
    before, after = f"{source.rstrip('/') if is_url(source) else Path(source)}/", ""
    urls = list(braceexpand(source)) if ".tar" in source and not Path(source).is_dir() else []
    parts = [found.groups() for url in urls if (found := _TAR.fullmatch(url))]
    if len(parts) < len(urls):
        raise UserError(f"{source}: a shard's name must end in .tar; name the tars or their folder.")
    if parts:
        before, _, after = parts[0]
    elif source.startswith("pipe:"):
        raise UserError(f"{source}: name the tars behind a command by a brace pattern such as {{000000..000127}}.tar.")
    if is_url(source):
        url = before + MANIFEST_NAME + after
        try:
            manifest = parse_manifest(fetch_text(url, patience), url)
        except OSError as error:
            raise UserError(f"{source}: no manifest can be fetched from {url} ({error}); check the address.") from error
    else:
        manifest = read_manifest(before)
    if parts:
        manifest = _choose(manifest, [name for _, name, _ in parts], source)
    urls = urls or [before + shard.name for shard in manifest.shards]
    return ShardSet(name=source, manifest=manifest, urls=tuple(urls))


def _choose(manifest: Manifest, names: list[str], source: str) -> Manifest:
    known = {shard.name: shard for shard in manifest.shards}
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"{source}: shard {unknown[0]} is not in the manifest, which ends at {max(known)}; correct the pattern."
        )
    chosen = tuple(known[name] for name in names)
    return dataclasses.replace(manifest, shards=chosen, num_samples=sum(shard.num_samples for shard in chosen))


def open_shard(source: ShardSet, number: int, patience: Patience, cache_dir: str = "", *, verify: bool = False) -> ShardReader:
    """Open shard `number` of `source`; from a URL as a file in `cache_dir` (an existing one is used as is), or an unnamed one.

    `verify`: compare its hash with the manifest's, unless already done. OSError if it cannot be opened or is not
    complete, SampleError if it is not a tar, or has changed.
    """
    record, url = source.manifest.shards[number], source.urls[number]
    if is_url(url):
        kept = Path(cache_dir) / f"{record.sha256[:16]}-{record.name}" if cache_dir else None
        file = fetch_file(url, record.bytes, patience, kept)
    else:
        file = open(url, "rb", buffering=0)  # noqa: SIM115 the reader closes it
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)  # its samples are soon read in random order
    if verify and number not in source.verified and os.fstat(file.fileno()).st_size == record.bytes:
        # Lengths that differ are left to who reads the samples.
        file.seek(0)  # one that was just fetched stands at its end
        if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:  # type: ignore[arg-type]
            file.close()
            raise SampleError("its contents are not what was written, by the sha256 in the manifest: some bits have flipped")
        source.verified.add(number)
    return ShardReader(file, url, record, source.manifest.members)
