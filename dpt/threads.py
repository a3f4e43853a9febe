"""A queue of calls that threads run in order."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_CLOSING_S = 10.0
_BESIDE_A_GPU = 4


def threads_beside(device: str) -> int:
    """Number of threads that read, score or write while a network predicts on `device` ("cpu", "cuda"): on a CPU they would
    only slow the network."""
    return 0 if device == "cpu" else _BESIDE_A_GPU


class Workers:
    """`count` threads that run calls in order; if 0, the calling thread runs them at once. They do not keep the process alive
    (unlike those of concurrent.futures), so that a hanging read cannot."""

    def __init__(self, count: int, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"{name} {i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, action: Callable[..., T], *arguments: Any) -> Future[T]:
        """Schedule `action(*arguments)`; returns the future of its result or exception."""
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
            del call, future, action, arguments  # else they would live until the next call

    def close(self) -> None:
        """End the threads once the calls so far are done, and wait for them."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(timeout=_CLOSING_S)


class InOrder(Generic[T]):
    """Calls that run in threads (at once without any), whose results come in the order of the calls, at most `behind` later."""

    def __init__(self, threads: int, name: str, *, behind: int) -> None:
        self._workers, self._behind = Workers(threads, name), behind if threads else 0
        self._begun: deque[Future[T]] = deque()

    def submit(self, action: Callable[..., T], *arguments: Any) -> Iterator[T]:
        """Schedule `action(*arguments)`; gives the results that are due, and must be read."""
        self._begun.append(self._workers.submit(action, *arguments))
        return self._due(self._behind)

    def finish(self) -> Iterator[T]:
        """Give all further results."""
        return self._due(0)

    def _due(self, behind: int) -> Iterator[T]:
        while len(self._begun) > behind:
            yield self._begun.popleft().result()

    def close(self) -> None:
        """End the threads once the calls so far are done, and wait for them."""
        self._workers.close()
