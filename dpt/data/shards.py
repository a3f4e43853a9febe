"""The samples of a shard folder one by one, by number; training reads them through `stream.py`."""

from pathlib import Path
from typing import Any

import numpy as np

from dpt.data.blocks import Shard, Workers
from dpt.data.reader import SampleError
from dpt.data.sources import Patience, is_url, open_shard, resolve
from dpt.errors import UserError


class ShardFolder:
    """The samples of a shard folder (or another source, see `sources.resolve`) in order: `len(folder)`, `folder[i]`.

    A sample is a dict: `key` (str), `meta` (dict) and numpy arrays, as documented. `cache_dir`: folder that keeps shards
    fetched from URLs; without one a shard is fetched when a sample of it follows one of another. UserError if the folder or its
    manifest is not whole; SampleError names a sample that cannot be read.
    """

    def __init__(self, source: str | Path, *, cache_dir: str = "") -> None:
        self._cache_dir = cache_dir
        self.folder = Path(source)
        self._source = resolve(str(source), Patience())
        self.manifest = self._source.manifest
        self._starts = np.cumsum([0, *(shard.num_samples for shard in self.manifest.shards)])
        self._open: tuple[int, Shard] | None = None

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        index = int(np.searchsorted(self._starts, number, "right")) - 1
        row, url = number - int(self._starts[index]), self._source.urls[index]
        if self._open is None or self._open[0] != index:
            self.close()
            patience = Patience() if is_url(url) else Patience(retries=0)  # a network may recover
            self._open = index, Shard(self._source, index, Workers(0, ""), patience, self._cache_dir, verify=is_url(url))
        try:
            return self._open[1].read(row, 1, lambda reader: reader.sample(row))
        except SampleError as error:
            raise SampleError(f"sample {row} of {url}: {error}") from error

    def verify(self, first: int, count: int, part: int = 0, parts: int = 1) -> None:
        """Hash every `parts`-th of the local shards that hold `count` samples from number `first` on, from the `part`-th on.

        UserError names one that is not as it was written. Those behind URLs are hashed whenever they are fetched.
        """
        shards = np.unique(np.searchsorted(self._starts, np.arange(first, first + count), "right") - 1).tolist()
        for number in shards[part::parts]:
            url = self._source.urls[number]
            if is_url(url):
                continue
            try:
                open_shard(self._source, number, Patience(retries=0), verify=True).close()
            except (SampleError, OSError) as error:
                raise UserError(f"{url}: {error}; encode the set anew.") from error

    def close(self) -> None:
        """Close the open shard."""
        self._open = None
