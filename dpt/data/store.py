"""The open shards of a process: opened or fetched ahead of need, closed when past."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dpt.data.fetch import Fetch, Patience, is_url, retry
from dpt.data.manifest import MemberSpec
from dpt.data.reader import RowFormat, RowLayout, SampleError, ShardReader
from dpt.data.sources import ShardSet

_PARALLEL_FETCHES = 16


@dataclass(kw_only=True)
class OpenShard:
    """An open shard, and the format of its rows (None: they differ, or not all wanted members are there as promised)."""

    reader: ShardReader
    row_format: RowFormat | None


class ShardError(SampleError):
    """A shard that cannot be opened at all."""


class ShardStore:
    """Open shards by (set, number). `expect` starts opening ahead of need, `release` closes what is past.

    `wanted`: for each set, the members to read. `cache_dir`: folder that keeps fetched shards; empty: unnamed temporary files.
    """

    def __init__(
        self, sets: Sequence[ShardSet], wanted: Sequence[Sequence[str]], patience: Patience, cache_dir: str = ""
    ) -> None:
        self._sets, self._wanted, self._patience = sets, wanted, patience
        self._cache_dir = Path(cache_dir) if cache_dir else None
        self._formats: list[dict[RowLayout, RowFormat]] = [{} for _ in sets]
        self._open: dict[tuple[int, int], OpenShard] = {}
        self._failed: dict[tuple[int, int], str] = {}
        self._fetches: dict[tuple[int, int], Fetch] = {}
        self._needed: dict[tuple[int, int], int] = {}

    def expect(self, place: tuple[int, int], when: int) -> None:
        """Shard `place` is needed for batch `when`; begin to load it."""
        known = place in self._needed
        self._needed[place] = when
        url = self._sets[place[0]].urls[place[1]]
        if known or self._cached(place) is not None:
            return
        if not is_url(url):
            with suppress(OSError), open(url, "rb", buffering=0) as file:  # `get` reports what is wrong
                _read_ahead(file)
            return
        if sum(not fetch.done for fetch in self._fetches.values()) < _PARALLEL_FETCHES:
            self._fetches[place] = self._start_fetch(place)

    def release(self, before: int) -> None:
        """Close the shards whose last expected batch is earlier than `before`."""
        for place in [place for place, when in self._needed.items() if when < before]:
            del self._needed[place]
            if (fetch := self._fetches.pop(place, None)) is not None:
                self._discard(fetch)
            if (opened := self._open.pop(place, None)) is not None:
                opened.reader.close()

    def get(self, place: tuple[int, int]) -> OpenShard:
        """The open shard. ShardError if it cannot be opened, at once when that was found before."""
        if (opened := self._open.get(place)) is not None:
            return opened
        if place in self._failed:
            raise ShardError(self._failed[place])
        try:
            opened = self._open[place] = retry(lambda: self._load(place), self._patience)
        except (OSError, SampleError) as error:
            self._failed[place] = f"the shard cannot be read ({getattr(error, 'strerror', None) or error})"
            raise ShardError(self._failed[place]) from error
        self._needed.setdefault(place, 0)
        return opened

    def reopen(self, place: tuple[int, int]) -> OpenShard:
        """Close the shard and open it anew, after a read error."""
        if (opened := self._open.pop(place, None)) is not None:
            opened.reader.close()
        return self.get(place)

    def close(self) -> None:
        """Close every shard."""
        self._needed.update(dict.fromkeys([*self._needed, *self._open], -1))
        self.release(0)

    def _discard(self, fetch: Fetch) -> None:
        fetch.abandon()
        if self._cache_dir is not None:
            Path(fetch.file.name).unlink(missing_ok=True)

    def _load(self, place: tuple[int, int]) -> OpenShard:
        number, shard = place
        source = self._sets[number]
        record, url = source.manifest.shards[shard], source.urls[shard]
        file = self._fetch(place) if is_url(url) else open(url, "rb", buffering=0)  # noqa: SIM115 the reader owns it
        try:
            reader = ShardReader(file, url, record.num_samples)
        except (OSError, SampleError):
            file.close()
            raise
        return OpenShard(reader=reader, row_format=self._format(number, reader))

    def _format(self, number: int, reader: ShardReader) -> RowFormat | None:
        layout, wanted = reader.layout, self._wanted[number]
        promised = self._sets[number].manifest.members
        found = {m.name: MemberSpec(dtype=np.dtype(m.dtype).name, shape=m.shape) for m in layout.members} if layout else {}
        if layout is None or any(found.get(name) != promised[name] for name in wanted):
            return None
        if layout not in self._formats[number]:
            self._formats[number][layout] = reader.row_format(wanted)
        return self._formats[number][layout]

    def _cached(self, place: tuple[int, int]) -> Path | None:
        """The shard's file in the cache folder, if it is there whole."""
        if self._cache_dir is None:
            return None
        path = self._cache_path(place)
        whole = path.is_file() and path.stat().st_size == self._sets[place[0]].manifest.shards[place[1]].bytes
        return path if whole else None

    def _cache_path(self, place: tuple[int, int]) -> Path:
        assert self._cache_dir is not None
        record = self._sets[place[0]].manifest.shards[place[1]]
        tag = hashlib.sha256(self._sets[place[0]].urls[place[1]].encode()).hexdigest()[:16]
        return self._cache_dir / f"{tag}-{record.name}"

    def _start_fetch(self, place: tuple[int, int]) -> Fetch:
        if self._cache_dir is None:
            file: Any = tempfile.TemporaryFile(prefix="dpt-shard-")  # noqa: SIM115 open as long as it is read
        else:
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            file = tempfile.NamedTemporaryFile(dir=self._cache_dir, prefix=".", suffix=".part", delete=False)  # noqa: SIM115
        return Fetch(self._sets[place[0]].urls[place[1]], file)

    def _fetch(self, place: tuple[int, int]) -> BinaryIO:
        if (path := self._cached(place)) is not None:
            return path.open("rb", buffering=0)
        fetch = self._fetches.pop(place, None) or self._start_fetch(place)
        try:
            file = fetch.wait(self._patience.stall_s)
            expected, found = self._sets[place[0]].manifest.shards[place[1]].bytes, os.fstat(file.fileno()).st_size
            if found != expected:
                raise OSError(f"{found} of {expected} bytes came")
        except OSError:
            self._discard(fetch)
            raise
        if self._cache_dir is not None:
            Path(file.name).replace(self._cache_path(place))
        return file


def _read_ahead(file: BinaryIO) -> None:
    """Ask the system to load the whole file: its samples are soon read in random order."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
