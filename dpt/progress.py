"""Progress of long work: a bar on a terminal, an occasional line elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Generic, TypeVar

from dpt.distributed import is_main

T = TypeVar("T")

LINE_INTERVAL_S = 10.0
"""Seconds between lines when the output is not a terminal."""


class Progress(Generic[T]):
    """A progress bar on a terminal, an occasional line elsewhere; both with rate and time left. Silent off rank 0.

    Iterate over it, or call `update`; `close` prints the last state.
    """

    def __init__(self, iterable: Iterable[T] | None, total: int | None, desc: str, unit: str, initial: int = 0) -> None:
        from tqdm import tqdm

        self._iterable, self._desc, self._unit, self._total = iterable, desc, unit, total
        self._count = self._initial = initial
        self._started = self._printed = time.monotonic()
        self._text = ""
        self._told = -1
        shown, terminal = is_main(), sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=desc, unit=unit, initial=initial, dynamic_ncols=True) if shown and terminal else None
        self._lines = shown and not terminal

    def update(self, count: int = 1, text: str = "") -> None:
        """Add `count` done items; `text` is shown beside the count."""
        self._count += count
        self._text = text or self._text
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
        elif self._lines and time.monotonic() - self._printed >= LINE_INTERVAL_S:
            self._print_line()

    def _print_line(self) -> None:
        from tqdm import tqdm

        self._printed, self._told = time.monotonic(), self._count
        elapsed = self._printed - self._started
        line = tqdm.format_meter(
            n=self._count,
            total=self._total,
            initial=self._initial,
            elapsed=elapsed,
            prefix=self._desc,
            unit=self._unit,
            postfix=self._text,
            bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Show the final state."""
        if self._bar is not None:
            self._bar.close()
        elif self._lines and self._told != self._count:
            self._print_line()
        self._lines = False

    def __iter__(self) -> Iterator[T]:
        assert self._iterable is not None
        for item in self._iterable:
            yield item
            self.update()
        self.close()

    def __enter__(self) -> "Progress[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def say(line: object) -> None:
    """Print a line to standard output at once; on a terminal, above the bars, which it would otherwise break."""
    from tqdm import tqdm

    tqdm.write(str(line))
    sys.stdout.flush()


def progress(items: Iterable[T] | int, desc: str, unit: str = "item", *, total: int | None = None) -> Progress[T]:
    """Show progress over `items`, or over a plain count advanced by `update`. `total`: for iterables without a length."""
    if isinstance(items, int):
        return Progress(None, items, desc, unit)
    if total is None and isinstance(items, Sized):
        total = len(items)
    return Progress(items, total, desc, unit)
