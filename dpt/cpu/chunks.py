"""Cut a loop over experts into chunks, so that what lies between two products stays small in a CPU's memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Numbers of a first product that a CPU works on at once: arrays between the two products are never larger. Smaller chunks
are faster for one thread, but threads that share a machine with other work then wait for each other too often."""


def expert_chunks(counts: list[int], width: int, x: Tensor) -> Iterator[tuple[int, slice, bool]]:
    """Yield (expert, rows, whether they are its first) for chunks of at most _CHUNK numbers on a CPU, at least one per expert.

    Below float32 precision an expert's rows are one chunk: its weights' gradients are summed within one product, not rounded
    between.
    """
    rows = max(1, _CHUNK // width)
    in_chunks = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    start = 0
    for number, count in enumerate(counts):
        step = rows if in_chunks else max(1, count)
        for first in range(0, max(1, count), step):
            yield number, slice(start + first, start + min(first + step, count)), first == 0
        start += count
