"""Threads that work ahead of their consumer: a few that work off calls in order, and one that runs a generator."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_PATIENCE_S = 10.0


class Workers:
    """`count` threads that work off calls in the order of submission. They end with the process, whatever they wait for."""

    def __init__(self, count: int, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"{name} {i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, action: Callable[..., T], *arguments: Any) -> Future[T]:
        """What `action(*arguments)` will return or raise."""
        future: Future[T] = Future()
        self._calls.put((future, action, arguments))
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
        """End the threads once the calls before this one are done, and wait for them."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(timeout=_PATIENCE_S)


class Prefetcher(Generic[T]):
    """Runs a generator in a thread, at most `depth` items ahead; its exceptions come out in their place.

    `stop`: set by `close`; the generator gives up what it waits for.
    """

    def __init__(self, items: Generator[T], depth: int, stop: threading.Event) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._items, self._stop = items, stop
        self._thread = threading.Thread(target=self._run, name="data prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                self._put((item, None))
                if self._stop.is_set():
                    break
        except BaseException as error:  # raised again where the item is asked for
            self._put((None, error))
        finally:
            self._items.close()

    def _put(self, entry: tuple[T | None, BaseException | None]) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return

    def __iter__(self) -> Iterator[T]:
        while True:
            item, error = self._queue.get()
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._thread.join(timeout=_PATIENCE_S)
