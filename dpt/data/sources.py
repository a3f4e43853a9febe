"""Where shards come from: folders, brace patterns and URLs, resolved through the manifest beside them."""

import dataclasses
import io
import re
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from dpt.data.fetch import Fetch, Patience, is_url, retry
from dpt.data.manifest import MANIFEST_NAME, Manifest, parse_manifest, read_manifest
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
    pattern = f"pipe:aws s3 cp '{source}' -" if source.startswith("s3://") else source
    urls = list(braceexpand(pattern)) if ".tar" in pattern else []
    names = [_TAR_NAME.findall(url)[-1].rsplit("/", 1)[-1] for url in urls if _TAR_NAME.search(url)]
    if len(names) < len(urls):
        raise UserError(f"{source}: a shard's name must end in .tar; name the tars or their folder.")
    if not is_url(pattern):
        folder = Path(urls[0]).parent if urls else Path(pattern)
        manifest = read_manifest(folder)
        urls = urls or [str(folder / shard.name) for shard in manifest.shards]
    else:
        if not urls and pattern.startswith("pipe:"):
            raise UserError(f"{source}: name the tars behind a command by a brace pattern such as {{000000..000127}}.tar.")
        base = pattern.rstrip("/")
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
        fetch = Fetch(url, io.BytesIO())
        return fetch.wait(patience.stall_s).getvalue()  # type: ignore[attr-defined]

    try:
        content = retry(load, patience)
    except OSError as error:
        raise UserError(f"{source}: no manifest can be fetched from {url} ({error}); check the address.") from error
    return parse_manifest(content.decode("utf-8", errors="replace"), url)
