"""Streams that the tests read to see what comes of a source."""

from itertools import islice
from pathlib import Path

import torch

from dpt.data.stream import LatentStream
from dpt.urls import Patience

HASTY = Patience(retries=1, wait_s=0.01, stall_s=30.0)


def stream(source: Path | str, **options) -> LatentStream:
    return LatentStream([str(source)], **{"global_batch_size": 5, "seed": 1, "patience": HASTY, **options})


def take(source: Path | str, batches: int, **options) -> list[dict]:
    return list(islice(stream(source, **options), batches))


def labels(found: LatentStream, batches: int) -> list[int]:
    return torch.cat([batch["label"] for batch in islice(found, batches)]).tolist()
