"""The samples of a shard folder one by one, by number; training reads them through `stream.py`."""

from pathlib import Path
from typing import Any

import numpy as np

from dpt.data.manifest import Manifest
from dpt.data.reader import SampleError, ShardReader
from dpt.data.sources import Patience, is_url, open_shard, resolve
from dpt.errors import UserError


class ShardFolder:
    """The samples of a shard folder (or another source, see `sources.resolve`) in order, by number: `len(folder)`, `folder[i]`.

    A sample is a dict: `key` (str), `meta` (dict) and numpy arrays, as documented. `cache_dir`: folder that keeps shards
    fetched from URLs; without one a shard is fetched when a sample of it follows one of another. UserError if the folder or its
    manifest is not whole, or a shard cannot be opened; SampleError names a damaged sample.
    """

    def __init__(self, source: str | Path, *, cache_dir: str = "", patience: Patience | None = None) -> None:
        self.folder = Path(source)
        self._patience, self._cache_dir = patience or Patience(), cache_dir
        self._source = resolve(str(source), self._patience)
        self.manifest: Manifest = self._source.manifest
        self._starts = np.cumsum([0, *(shard.num_samples for shard in self.manifest.shards)])
        self._open: tuple[int, ShardReader] | None = None

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self._starts, number, "right")) - 1
        return self._read(shard, number - int(self._starts[shard]))

    def _read(self, shard: int, row: int) -> dict[str, Any]:
        url = self._source.urls[shard]
        if self._open is None or self._open[0] != shard:
            self.close()
            patience = self._patience if is_url(url) else Patience(retries=0)
            try:
                reader = patience.retry(lambda: open_shard(self._source, shard, patience, self._cache_dir))
            except OSError as error:
                raise UserError(f"{url}: the shard cannot be read ({error.strerror or error}); encode the set anew.") from error
            self._open = (shard, reader)
        try:
            return self._open[1].sample(row)
        except (SampleError, OSError) as error:
            raise SampleError(f"sample {row} of {url}: {error}") from error

    def close(self) -> None:
        """Close the open shard."""
        if self._open is not None:
            self._open[1].close()
            self._open = None
