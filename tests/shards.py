"""Shard folders made of arrays, for tests that read some."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.encoding.shards import ShardWriter
from dpt.data.manifest import Manifest, MemberSpec, VAERecord, write_manifest


def write_set(
    folder: Path,
    counts: Sequence[int],
    make: Callable[[int], dict[str, np.ndarray]],
    *,
    key: str = "s{:05d}",
    meta: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """Shards of `counts` samples each, numbered through; `fields` override the manifest's."""
    folder.mkdir(parents=True, exist_ok=True)
    records, number = [], 0
    for shard, count in enumerate(counts):
        with ShardWriter(folder / f"{shard:06d}.tar") as writer:
            for _ in range(count):
                members = make(number)
                writer.add(key.format(number), members, meta or {"number": number})
                number += 1
            records.append(writer.commit())
    values: dict[str, Any] = {
        "dataset": "tiny",
        "split": "train",
        "task": "class",
        "resolution": 32,
        "num_samples": number,
        "shards": tuple(records),
        "members": {name: MemberSpec(dtype=a.dtype.name, shape=a.shape) for name, a in members.items()},
        "vae": VAERecord(name="tiny", sha256="a" * 64, scaling_factor=0.18215, latent_channels=4),
    }
    write_manifest(folder, Manifest(**{**values, **fields}))
    return folder


def moments(random: np.random.Generator, side: int, *leading: int, channels: int = 4) -> np.ndarray:
    """Random posteriors float16 `[*leading, 2, channels, side, side]`: normal means, log-variances of -6."""
    mean = random.normal(size=(*leading, 1, channels, side, side))
    return np.concatenate([mean, np.full_like(mean, -6.0)], axis=-4).astype(np.float16)
