"""The encoding job: shards of a fixed list of keys, each written once by whoever gets to it, and the manifest of them all.

Shard i holds keys [i * S, (i + 1) * S). Beside each finished tar lies a record (`.records/NNNNNN.json`); a shard without one is
encoded anew, so a job may be killed at any moment. Batches never cross shards: the bytes do not depend on who encoded what.
"""

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.encoding.samples import Layout, Prepared, prepare
from data_tools.readers import Excluded, Reader, ReadError
from dpt import distributed
from dpt.data.codec import VAECodec
from dpt.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    MemberSpec,
    ShardRecord,
    Skipped,
    VAERecord,
    read_manifest,
    write_atomically,
    write_manifest,
)
from dpt.data.shards import ShardWriter, shard_key
from dpt.errors import UserError

RECORDS = ".records"
_CHANNELS_AXIS = -3


@dataclass(frozen=True, kw_only=True)
class EncodingJob:
    """What is encoded, and where to."""

    reader: Reader
    codec: VAECodec
    layout: Layout
    split: str
    out: Path
    samples_per_shard: int = 1024
    batch_size: int = 16
    """Samples whose images go through the VAE together."""
    num_readers: int = 2
    """Threads that read and prepare ahead of the VAE."""
    max_skipped_share: float = 0.01
    """Unreadable inputs, as a share of all, above which the job fails."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that the shards' bytes depend on."""
        return {
            "dataset": self.reader.name,
            "split": self.split,
            "reader_version": self.reader.version,
            "vae_sha256": self.codec.sha256,
            "samples_per_shard": self.samples_per_shard,
            "batch_size": self.batch_size,
            "dtype": str(self.codec.vae.dtype),
            **dataclasses.asdict(self.layout),
        }


def run(job: EncodingJob, part: int = 0, num_parts: int = 1) -> Manifest | None:
    """Encode every `num_parts`-th shard from the `part`-th on; the manifest, if with these all shards are there.

    UserError: nothing to encode, a folder of other shards, or more unreadable inputs than `max_skipped_share`.
    """
    keys = job.reader.keys()
    if not keys:
        raise UserError(f"{job.reader.name}: the split {job.split!r} has no samples; check --root and --split.")
    done = _open_folder(job)
    if done is not None:
        return done
    starts = list(range(0, len(keys), job.samples_per_shard))
    mine = [i for i in range(part, len(starts), num_parts) if not _record_path(job.out, i).exists()]
    todo = [keys[starts[i] : starts[i] + job.samples_per_shard] for i in mine]
    skipped = 0
    bar: distributed.Progress[Any] = distributed.progress(
        sum(map(len, todo)), f"encode {job.reader.name} {job.split}", "sample"
    )
    with bar as progress:
        for number, shard_keys in zip(mine, todo, strict=True):
            skipped += _encode_shard(job, number, shard_keys, progress)
            _check_skipped(job, skipped, len(keys))
    if not all(_record_path(job.out, i).exists() for i in range(len(starts))):
        return None
    return _merge(job, len(starts), len(keys))


def _open_folder(job: EncodingJob) -> Manifest | None:
    """Claim the folder for these settings; its manifest if it is complete."""
    path, text = job.out / RECORDS / "job.json", json.dumps(job.identity, indent=1, sort_keys=True)
    if path.exists() and path.read_text() != text:
        old, new = json.loads(path.read_text()), json.loads(text)
        other = ", ".join(f"{k} {old.get(k)!r} instead of {v!r}" for k, v in new.items() if old.get(k) != v)
        raise UserError(f"{job.out} holds shards encoded with {other}; choose another --out or remove the folder.")
    if path.exists() and (job.out / MANIFEST_NAME).exists():
        return read_manifest(job.out)
    if not path.exists() and job.out.exists() and any(job.out.iterdir()):
        raise UserError(f"{job.out} is not empty and was not made by this command; choose another --out.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return None


def _encode_shard(job: EncodingJob, number: int, keys: list[str], progress: Any) -> int:
    """Write one shard and its record; the number of inputs that could not be read."""
    skipped: list[dict[str, Any]] = []
    sums: dict[str, NDArray[np.float64]] = {}
    members: dict[str, dict[str, Any]] = {}
    with ShardWriter(job.out / f"{number:06d}.tar") as writer:
        for batch in _batches(_prepared(job, keys, skipped, progress), job.batch_size):
            for sample, latents in zip(batch, _encode(job.codec, batch), strict=True):
                arrays = {**sample.arrays, **latents}
                _describe(members, arrays)
                _accumulate(sums, latents)
                writer.add(shard_key(sample.key), arrays, sample.meta)
        record = writer.commit()
    content = {
        "shard": dataclasses.asdict(record),
        "skipped": skipped,
        "members": members,
        "sums": {name: value.tolist() for name, value in sums.items()},
    }
    write_atomically(_record_path(job.out, number), json.dumps(content))
    return sum(not s["excluded"] for s in skipped)


def _prepared(job: EncodingJob, keys: list[str], skipped: list[dict[str, Any]], progress: Any) -> Iterator[Prepared]:
    """Samples in the order of `keys`, read ahead in threads; what cannot be read is noted in `skipped`."""

    def work(key: str) -> Prepared:
        return prepare(job.reader.read(key), job.layout)

    with ThreadPoolExecutor(job.num_readers) as pool:
        ahead = 2 * job.batch_size + job.num_readers
        remaining = iter(keys)
        waiting: list[tuple[str, Future[Prepared]]] = [(k, pool.submit(work, k)) for k in islice(remaining, ahead)]
        while waiting:
            key, future = waiting.pop(0)
            for following in islice(remaining, 1):
                waiting.append((following, pool.submit(work, following)))
            try:
                yield future.result()
            except ReadError as error:
                reason = error.reason
                skipped.append({"key": key, "reason": reason, "excluded": isinstance(error, Excluded)})
            progress.update()


def _batches(samples: Iterator[Prepared], size: int) -> Iterator[list[Prepared]]:
    while batch := list(islice(samples, size)):
        yield batch


def _encode(codec: VAECodec, batch: list[Prepared]) -> list[dict[str, NDArray[np.float16]]]:
    """Moments float16 [N, 2, C, h, w] (class images: [2, C, h, w]) of every member of every sample, in one pass."""
    images = np.concatenate([i for sample in batch for i in sample.images.values()])
    moments = codec.encode(torch.from_numpy(images)).cpu().numpy().astype(np.float16)
    results, start = [], 0
    for sample in batch:
        latents = {}
        for name, stack in sample.images.items():
            part = moments[start : start + len(stack)]
            latents[name] = part if name.endswith(("cond_latents", "target_latents")) else part[0]
            start += len(stack)
        results.append(latents)
    return results


def _describe(members: dict[str, dict[str, Any]], arrays: dict[str, NDArray[Any]]) -> None:
    """Note dtype and shape of each member; -1 for a side that differs between samples."""
    for name, array in arrays.items():
        known = members.setdefault(name, {"dtype": array.dtype.name, "shape": list(array.shape)})
        known["shape"] = [a if a == b else -1 for a, b in zip(known["shape"], array.shape, strict=True)]


def _accumulate(sums: dict[str, NDArray[np.float64]], latents: dict[str, NDArray[np.float16]]) -> None:
    """Add up count, sum and sum of squares of the posterior mean, by channel: float64 [3, C]."""
    for name, moments in latents.items():
        means = np.moveaxis(moments[..., 0, :, :, :].astype(np.float64), _CHANNELS_AXIS, 0)
        flat = means.reshape(means.shape[0], -1)
        part = np.stack([np.full(len(flat), flat.shape[1], dtype=np.float64), flat.sum(1), np.square(flat).sum(1)])
        sums[name] = sums[name] + part if name in sums else part


def _check_skipped(job: EncodingJob, skipped: int, total: int) -> None:
    if skipped > job.max_skipped_share * total:
        raise UserError(
            f"{job.reader.name}: {skipped} of {total} inputs could not be read, more than --max-skipped-share "
            f"{job.max_skipped_share}; they are listed in {job.out / RECORDS}: mend them, or allow more."
        )


def _record_path(out: Path, number: int) -> Path:
    return out / RECORDS / f"{number:06d}.json"


def _merge(job: EncodingJob, num_shards: int, num_keys: int) -> Manifest:
    """The manifest out of the shards' records."""
    records = [json.loads(_record_path(job.out, i).read_text()) for i in range(num_shards)]
    listed = [s for r in records for s in r["skipped"]]
    _check_skipped(job, sum(not s["excluded"] for s in listed), num_keys)
    members: dict[str, dict[str, Any]] = {}
    sums: dict[str, NDArray[np.float64]] = {}
    for record in records:
        for name, spec in record["members"].items():
            known = members.setdefault(name, spec)
            known["shape"] = [a if a == b else -1 for a, b in zip(known["shape"], spec["shape"], strict=True)]
        for name, value in record["sums"].items():
            sums[name] = sums[name] + np.array(value) if name in sums else np.array(value)
    statistics = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        statistics[name] = {"mean": mean.tolist(), "std": np.sqrt(np.maximum(squares / count - mean**2, 0)).tolist()}
    shards = tuple(ShardRecord(**r["shard"]) for r in records if r["shard"]["num_samples"])
    if not shards:
        raise UserError(
            f"{job.reader.name}: none of the {num_keys} inputs of {job.split!r} is usable; see {job.out / RECORDS}."
        )
    manifest = Manifest(
        dataset=job.reader.name,
        split=job.split,
        task=job.layout.task,
        resolution=job.layout.resolution,
        num_samples=sum(s.num_samples for s in shards),
        shards=shards,
        members={name: MemberSpec(dtype=m["dtype"], shape=tuple(m["shape"])) for name, m in members.items()},
        vae=VAERecord(
            name=job.codec.name,
            sha256=job.codec.sha256,
            scaling_factor=job.codec.scaling_factor,
            latent_channels=job.codec.latent_channels,
        ),
        reader_version=str(job.reader.version),
        filter=f"{sum(s['excluded'] for s in listed)} samples left out by the reader's filter" if listed else "",
        mirrored=job.layout.mirrored,
        encoding={"fit": job.layout.fit, "prompt": job.layout.prompt, "dtype": str(job.codec.vae.dtype)},
        skipped=tuple(Skipped(key=s["key"], reason=s["reason"]) for s in listed),
        num_skipped=len(listed),
        class_names=tuple(job.reader.class_names),
        statistics=statistics,
    )
    write_manifest(job.out, manifest)
    return manifest
