"""Threads that open (or fetch) shards, and read blocks of neighbouring rows before they are needed."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
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

    def __init__(
        self, source: ShardSet, number: int, openers: Workers, patience: Patience, cache_dir: str, *, verify: bool = False
    ) -> None:
        self.url, self.num_samples = source.urls[number], source.manifest.shards[number].num_samples
        self._patience = patience
        self._open = partial(
            openers.submit, patience.retry, partial(open_shard, source, number, patience, cache_dir, verify=verify)
        )
        self._opened: Future[ShardReader] = self._open()

    def read(self, first: int, count: int, action: Callable[[ShardReader], T]) -> T:
        """`action(reader)`, which reads `count` samples from number `first` on; after an OSError again, on the file anew.

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
            return self._patience.retry(attempt)
        except OSError as error:
            raise SampleError(error.strerror or str(error)) from error
        except (SampleError, UserError, Stopped):
            raise
        except Exception as error:
            which = f"samples {first} to {first + count - 1}" if count > 1 else f"sample {first}"
            raise UserError(
                f"{which} of {self.url}: the thread that reads failed ({type(error).__name__}: {error}); start the run again, "
                "and report it if it comes back."
            ) from error


class Block:
    """Neighbouring rows of a shard, from number `first` on, that are being read into `rows`, from row `at` on."""

    def __init__(self, shard: Shard, first: int, rows: Rows, readers: Workers) -> None:
        self.shard, self.first, self._rows = shard, first, rows
        self._count = min(rows.size, shard.num_samples - first)
        self.at = rows.free.pop()
        self._reading: Future[None] | None = readers.submit(self._read)

    def __del__(self) -> None:
        self._rows.free.append(self.at)

    def _read(self) -> None:
        """What cannot be read is not sound: each sample is tried alone when its turn comes, and named."""
        try:
            self.shard.read(self.first, self._count, lambda reader: reader.rows(self.first, self._count, self._rows, self.at))
        except SampleError:
            self._rows.sound[self.at : self.at + self._count] = False

    def wait(self) -> None:
        """Until it is read. UserError if the thread failed for a reason other than unreadable data."""
        if self._reading is not None:
            self._reading.result()
            self._reading = None
