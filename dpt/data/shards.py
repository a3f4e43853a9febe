"""Shards of a source, opened (or fetched) and read by threads: in blocks of neighbouring samples for training, singly for
evaluation."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dpt.data.reader import Rows, SampleError, ShardReader
from dpt.data.sources import ShardSet, open_shard, resolve
from dpt.errors import UserError
from dpt.threads import Workers
from dpt.urls import Patience, Stopped, is_url

T = TypeVar("T")


class ShardError(SampleError):
    """A shard that cannot be opened at all."""


class Shard:
    """Shard `number` of a source, which one thread opens and others read. It is closed once nothing references it."""

    def __init__(
        self, source: ShardSet, number: int, openers: Workers, patience: Patience, cache_dir: str, *, verify: bool
    ) -> None:
        self.number, self.url, self.num_samples = number, source.urls[number], source.manifest.shards[number].num_samples
        self._patience = patience
        opening = partial(open_shard, source, number, patience, cache_dir, verify=verify)
        self._open = partial(openers.submit, patience.retry, opening)
        self._opened: Future[ShardReader] = self._open()

    def read(self, first: int, count: int, action: Callable[[ShardReader], T], *, patient: bool = True) -> T:
        """Call `action(reader)`, which reads `count` samples from number `first` on; after an OSError, reopen and retry.

        SampleError if they cannot be read, ShardError if none can; any other failure becomes a UserError that names them.
        """

        def attempt() -> T:
            error = self._opened.exception()  # not raised: its traceback would keep blocks alive
            if isinstance(error, OSError | SampleError):
                raise ShardError(f"the shard cannot be read ({getattr(error, 'strerror', None) or error})")
            try:
                return action(self._opened.result())
            except OSError:
                self._opened = self._open()
                raise

        try:
            return self._patience.retry(attempt) if patient else attempt()
        except OSError as error:
            raise SampleError(error.strerror or str(error)) from error
        except (SampleError, Stopped):
            raise
        except Exception as error:
            which = f"samples {first} to {first + count - 1}" if count > 1 else f"sample {first}"
            raise UserError(
                f"{which} of {self.url}: the thread that reads failed ({type(error).__name__}: {error}); start the run again, "
                "and report it if it comes back."
            ) from error


class Block:
    """Neighbouring samples of a shard, from number `first` on, being read into `rows`, from row `at` on."""

    def __init__(self, shard: Shard, first: int, rows: Rows, readers: Workers) -> None:
        self.first, self._shard, self._rows = first, shard, rows
        self.shard_lost = False
        """Whether the whole shard is unreadable."""
        self.at = rows.free.pop()
        self._errors: Future[dict[int, str]] = readers.submit(self._read, first, min(rows.size, shard.num_samples - first))

    def __del__(self) -> None:
        self._rows.free.append(self.at)

    @property
    def errors(self) -> dict[int, str]:
        """The reason for each unreadable sample, by number, once read. UserError if the thread failed for another reason."""
        return self._errors.result()

    def _read(self, first: int, count: int, *, patient: bool = True) -> dict[int, str]:
        at = self.at + first - self.first
        try:
            return self._shard.read(first, count, lambda reader: reader.read(first, count, self._rows, at), patient=patient)
        except ShardError as error:
            self.shard_lost = True
            return dict.fromkeys(range(first, first + count), str(error))
        except SampleError as error:
            if count == 1:
                return {first: str(error)}
        errors: dict[int, str] = {}  # the disk fails somewhere in the block
        for number in range(first, first + count):
            errors |= self._read(number, 1, patient=False)
        return errors


class ShardFolder:
    """The samples of a shard folder (or another source, see `sources.resolve`) in order: `len(folder)`, `folder[i]`.

    A sample is a dict: `key` (str), `meta` (dict) and numpy arrays, as documented. `cache_dir`: folder for shards
    fetched from URLs; without one, a shard is fetched whenever its samples follow another's. UserError if the folder or its
    manifest is incomplete; SampleError names a sample that cannot be read.
    """

    def __init__(self, source: str | Path, *, cache_dir: str = "") -> None:
        self._cache_dir = cache_dir
        self.folder = Path(source)
        self._source = resolve(str(source), Patience())
        self.manifest = self._source.manifest
        self._starts = np.cumsum([0, *(shard.num_samples for shard in self.manifest.shards)])
        self._shard: Shard | None = None

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        index = int(np.searchsorted(self._starts, number, "right")) - 1
        row, url = number - int(self._starts[index]), self._source.urls[index]
        if self._shard is None or self._shard.number != index:
            patience = Patience() if is_url(url) else Patience(retries=0)  # a network may recover
            self._shard = Shard(self._source, index, Workers(0, ""), patience, self._cache_dir, verify=is_url(url))
        try:
            return self._shard.read(row, 1, lambda reader: reader.sample(row))
        except SampleError as error:
            raise SampleError(f"sample {row} of {url}: {error}") from error

    def verify(self, first: int, count: int, part: int = 0, parts: int = 1) -> None:
        """Hash every `parts`-th of the local shards that hold `count` samples from number `first` on, from the `part`-th on.

        UserError names one that has changed. Shards behind URLs are hashed whenever they are fetched.
        """
        shards = np.unique(np.searchsorted(self._starts, np.arange(first, first + count), "right") - 1).tolist()
        for number in shards[part::parts]:
            if not is_url(url := self._source.urls[number]):
                try:
                    open_shard(self._source, number, Patience(retries=0), verify=True).close()
                except (SampleError, OSError) as error:
                    raise UserError(f"{url}: {error}; encode the set again.") from error

    def close(self) -> None:
        """Close the open shard."""
        self._shard = None
