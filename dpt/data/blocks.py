"""Reading ahead: threads that open (or fetch) shards, and read blocks of neighbouring rows before they are needed."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from dpt.data.reader import Rows, SampleError, ShardReader
from dpt.data.sources import Patience, ShardSet, Stopped, open_shard
from dpt.errors import UserError

T = TypeVar("T")

_CLOSING_S = 10.0


class ShardError(SampleError):
    """A shard that cannot be opened at all."""


class Workers:
    """`count` threads that work off calls in order, or if it is 0 the caller's, at once. They do not keep the process alive
    (as those of concurrent.futures do), so that a read that hangs cannot."""

    def __init__(self, count: int, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"{name} {i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, action: Callable[..., T], *arguments: Any) -> Future[T]:
        """What `action(*arguments)` will return or raise."""
        future: Future[T] = Future()
        self._calls.put((future, action, arguments))
        if not self._threads:
            self._calls.put(None)
            self._run()
        return future

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, action, arguments = call
            try:
                future.set_result(action(*arguments))
            except BaseException as error:  # raised again where the result is asked for
                future.set_exception(error)
            del call, future, action, arguments  # else they live until the next call

    def close(self) -> None:
        """End the threads once the calls so far are done, and wait for them."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(timeout=_CLOSING_S)


class Shard:
    """A shard that one thread opens (or fetches) and others read. It is closed once nothing refers to it."""

    def __init__(self, source: ShardSet, number: int, openers: Workers, patience: Patience, cache_dir: str) -> None:
        self.url, self.num_samples = source.urls[number], source.manifest.shards[number].num_samples
        self._patience = patience
        self._open = partial(openers.submit, patience.retry, partial(open_shard, source, number, patience, cache_dir))
        self._opened: Future[ShardReader] = self._open()

    def read(self, action: Callable[[ShardReader], T]) -> T:
        """`action(reader)`, after an OSError again on a newly opened file. ShardError if it cannot be opened."""
        try:
            return action(self._reader())
        except OSError:
            return self._patience.retry(lambda: action(self._reader(anew=True)))

    def _reader(self, anew: bool = False) -> ShardReader:
        if anew:
            self._opened = self._open()
        error = self._opened.exception()  # not raised: its traceback would keep blocks alive
        if isinstance(error, OSError | SampleError):
            raise ShardError(f"the shard cannot be read ({getattr(error, 'strerror', None) or error})")
        return self._opened.result()


class Block:
    """Neighbouring rows of a shard, from number `first` on, and where they are: in `rows`, from row `at` on."""

    def __init__(self, shard: Shard, first: int, rows: Rows) -> None:
        self.shard, self.first, self._rows = shard, first, rows
        self._count = min(rows.block, shard.num_samples - first)
        self._reading: Future[None] | None = None
        self.at = -1

    def begin(self, readers: Workers) -> None:
        """Have it read, once. What cannot be read is not sound: each sample is tried alone when its turn comes, and named."""
        if self.at < 0:
            self.at = self._rows.take()
            weakref.finalize(self, self._rows.give_back, self.at).atexit = False
            self._reading = readers.submit(self._read)

    def _read(self) -> None:
        try:
            self.shard.read(lambda reader: reader.rows(self.first, self._count, self._rows, self.at))
        except (OSError, SampleError):
            self._rows.sound[self.at : self.at + self._count] = False

    def wait(self) -> None:
        """Until it is read."""
        if self._reading is not None:
            with naming(f"samples {self.first} to {self.first + self._count - 1} of {self.shard.url}"):
                self._reading.result()
            self._reading = None


@contextmanager
def naming(samples: str) -> Iterator[None]:
    """What a thread fails with, other than unreadable data, as a UserError that names the samples."""
    try:
        yield
    except (SampleError, UserError, Stopped):
        raise
    except Exception as error:
        raise UserError(
            f"{samples}: the thread that reads them failed ({type(error).__name__}: {error}); "
            "start the run again, and report it if it comes back."
        ) from error
