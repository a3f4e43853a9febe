"""Work ahead of its consumer: an iterator in a thread, iterators in worker processes."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

T = TypeVar("T")


class Ahead(Generic[T]):
    """Runs a generator in a thread, at most `depth` items ahead; its exceptions come out in their place."""

    def __init__(self, items: Generator[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._items = items
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                self._put((item, None))
                if self._stopped.is_set():
                    break
        except BaseException as error:  # raised again where the item is asked for
            self._put((None, error))
        finally:
            self._items.close()

    def _put(self, entry: tuple[T | None, BaseException | None]) -> None:
        while not self._stopped.is_set():
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
        self._stopped.set()
        self._thread.join(timeout=10.0)


class _InWorker(IterableDataset):
    def __init__(self, make: Callable[[int], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        return self._make(info.id)


def in_workers(make: Callable[[int], Iterator[Any]], count: int, depth: int) -> Iterator[Any]:
    """Items of `count` endless iterators in turn: the i-th comes from `make(i % count)`, run in process i % count.

    `depth`: items that each works ahead. Tensors come through shared memory. A process that dies is a RuntimeError here.
    """
    # Forked: the iterators need no pickling, and start at once. They touch no GPU.
    loader = DataLoader(
        _InWorker(make), batch_size=None, num_workers=count, prefetch_factor=depth, multiprocessing_context="fork"
    )
    return iter(loader)
