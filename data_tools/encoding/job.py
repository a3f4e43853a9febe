"""The encoding job: shards of a fixed list of keys, each written once by whoever gets to it, and the manifest of them all.

Shard i is made of keys [i * S, (i + 1) * S). Each finished tar has a record beside it; a shard without one is made again,
so a job may be killed at any time. Batches never cross shards: the bytes do not depend on who made what.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.encoding.pipeline import BatchEncoder, Encoded, SampleEncoder
from data_tools.encoding.reading import Unread, read_ahead
from data_tools.encoding.records import Description, Records
from data_tools.encoding.samples import Features, Layout
from data_tools.encoding.shards import ShardWriter, shard_key
from data_tools.readers import Reader
from dpt.data.manifest import Manifest, Skipped, read_manifest, write_manifest
from dpt.data.order import permutation
from dpt.errors import UserError
from dpt.progress import Progress, progress
from dpt.target_codes import DEPTH_CODE


@dataclass(frozen=True, kw_only=True)
class EncodingJob:
    """An encoding job: what it encodes, how, and where to."""

    reader: Reader
    encoder: BatchEncoder
    layout: Layout
    split: str
    out: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    """The reader's own options that differ from its defaults (`data_tools.readers.changed_options`)."""
    samples_per_shard: int = 1024
    """Inputs per shard (fewer samples if some cannot be read, twice as many if perception samples are mirrored too)."""
    limit: int | None = None
    """Inputs to encode, the first in the order of the shards; None: all."""
    shuffle_seed: int | None = 0
    """Seed of the samples' order in the shards; None: the set's own order."""
    features: Features | None = None
    """Features kept of each sample, for aligning hidden states (`dpt.training.feature_alignment`)."""
    processes: int = 0
    """Processes that read and prepare ahead of the VAE; 0: this one does."""
    synthetic: bool = False
    """Whether the inputs are our rendered scenes."""
    max_skipped_share: float = 0.01
    """Share of unreadable inputs above which the job fails."""

    def keys(self) -> list[str]:
        """The inputs in the order of the shards. UserError if there are none."""
        keys = self.reader.keys()
        if not keys:
            raise UserError(f"{self.reader.name}: the split {self.split!r} has no samples; check --root and --split.")
        if self.shuffle_seed is not None:
            keys = [keys[i] for i in permutation(len(keys), self.shuffle_seed).tolist()]
        return keys[: self.limit]

    def settings(self, keys: Sequence[str]) -> dict[str, Any]:
        """Everything that the shards' bytes depend on, which jobs that share a folder must share too."""
        codec, clip, layout = self.encoder.codec, self.encoder.clip, self.layout
        # Linear depth is not recorded, as before other codes existed, so that older jobs can resume.
        coded_depth = layout.task == "depth" and layout.depth_code != DEPTH_CODE
        found = self.features
        return {
            "dataset": self.reader.name,
            "split": self.split,
            "reader_version": self.reader.version,
            **({"options": dict(self.options)} if self.options else {}),
            "num_inputs": len(keys),
            "inputs_sha256": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
            "vae_sha256": codec.sha256,
            "clip_sha256": None if clip is None else clip.sha256,
            "dtype": str(codec.vae.dtype).removeprefix("torch."),
            "batch_size": self.encoder.batch_size,
            "samples_per_shard": self.samples_per_shard,
            "shuffle_seed": self.shuffle_seed,
            "resolution": layout.resolution,
            "mirrored": layout.mirrored,
            "evaluation": layout.evaluation,
            "prompt": layout.prompt if layout.task == "depth" else None,
            **({"depth_code": layout.depth_code} if coded_depth else {}),
            **({"flow_code": layout.flow_code} if layout.task == "flow" else {}),
            "fit": layout.fit if layout.task != "class" else "crop",
            **({"features": {"name": found.name, "channels": found.channels, "grid": list(found.grid)}} if found else {}),
        }


def run(job: EncodingJob, part: int = 0, num_parts: int = 1) -> Manifest | None:
    """Make every `num_parts`-th shard from the `part`-th on unless it exists; returns the manifest once all exist.

    UserError: nothing to encode, a folder of other shards, or more unreadable inputs than `max_skipped_share`.
    """
    keys = job.keys()
    records = Records(job.out)
    if not records.claim(job.settings(keys)):
        size = job.samples_per_shard
        shards = {number: keys[start : start + size] for number, start in enumerate(range(0, len(keys), size))}
        missing = {n: inputs for n, inputs in shards.items() if n % num_parts == part and not records.done(n)}
        try:
            if missing and not records.finished:
                _make_shards(job, records, missing, len(keys))
        except UserError:
            records.remove_if_unused()
            raise
    return finish(job, missing_ok=True)


def finish(job: EncodingJob, missing_ok: bool = False) -> Manifest | None:
    """Write the manifest from the records of all shards; if some are missing, None with `missing_ok`, else UserError."""
    keys = job.keys()
    records = Records(job.out)
    settings = job.settings(keys)
    if records.claim(settings):
        return _finished(job, records)
    numbers = range(-(-len(keys) // job.samples_per_shard))
    missing = [number for number in numbers if not records.done(number)]
    if missing:
        if missing_ok:  # if there is a manifest, another job finished last and cleaned up
            return _finished(job, records) if records.finished else None
        records.remove_if_unused()
        raise UserError(
            f"{job.out}: {len(missing)} of {len(numbers)} shards are missing, {missing[0]:06d} for one; encode them first."
        )
    try:
        found = [records.read(number) for number in numbers]
    except FileNotFoundError:
        return _finished(job, records)  # another job has just merged and removed them
    manifest = _merge(job, settings, found, len(keys))
    write_manifest(job.out, manifest)
    records.remove()
    return manifest


def _finished(job: EncodingJob, records: Records) -> Manifest:
    records.remove()
    return read_manifest(job.out)


def _make_shards(job: EncodingJob, records: Records, missing: dict[int, list[str]], num_inputs: int) -> None:
    total = sum(map(len, missing.values()))
    bar: Progress[Any] | None = None
    if os.environ.get("RANK", "0") == "0":
        bar = progress(total, f"encode {job.reader.name} {job.split}", "input")
    writer = _Writer(job, records, bar)
    encoder = SampleEncoder(job.encoder, writer.add)
    # Two batches and one more; evaluation sets have pictures of 100 MB.
    ahead = 8 if job.layout.evaluation else 3 * job.encoder.batch_size
    every = [key for keys in missing.values() for key in keys]
    inputs = read_ahead(job.reader, job.layout, every, job.processes, ahead, job.features)
    unreadable = 0
    try:
        for number, keys in missing.items():
            encoder.end(partial(writer.begin, number))
            unread: list[Unread] = []
            for _, found in zip(keys, inputs, strict=False):
                if isinstance(found, Unread):
                    unread.append(found)
                    unreadable += not found.excluded
                    _check_unreadable(job, unreadable, num_inputs, found)
                else:
                    for sample in found:
                        encoder.add(sample)
            encoder.end(partial(writer.end, number, unread))
        encoder.close()
    except BaseException:
        encoder.abort()
        writer.abort()
        raise
    finally:
        inputs.close()
        if bar is not None:
            bar.close()


def _check_unreadable(job: EncodingJob, unreadable: int, total: int, last: Unread | None) -> None:
    if unreadable > job.max_skipped_share * total:
        example = f" ({last.key}: {last.reason})" if last else ""
        raise UserError(
            f"{job.reader.name}: {unreadable} of {total} inputs cannot be read{example}, more than the share "
            f"{job.max_skipped_share:g} allowed; fix them or raise --max-skipped-share."
        )


class _Writer:
    """Writes encoded samples into the current shard; called by the encoder's thread."""

    def __init__(self, job: EncodingJob, records: Records, bar: Progress[Any] | None) -> None:
        self._job, self._records, self._bar = job, records, bar
        self._shard: ShardWriter | None = None

    def begin(self, number: int) -> None:
        """Begin shard `number`."""
        self._shard, self._description = ShardWriter(self._job.out / f"{number:06d}.tar"), Description()

    def add(self, encoded: Encoded) -> None:
        """Write a sample."""
        assert self._shard is not None
        members, meta = encoded.members(), encoded.sample.meta
        self._description.add(members)
        self._shard.add(shard_key(encoded.sample.key), members, meta)
        self._advance(0 if meta.get("mirrored") else 1)

    def end(self, number: int, unread: list[Unread]) -> None:
        """Finish shard `number`, whose inputs `unread` gave no sample."""
        assert self._shard is not None
        self._description.unread = [vars(one) for one in unread]
        record = None
        if self._shard.num_samples:
            record = self._shard.commit()
        else:
            self._shard.abort()
        self._shard = None
        self._records.write(number, record, self._description)
        self._advance(len(unread))

    def _advance(self, inputs: int) -> None:
        if self._bar is not None:
            self._bar.update(inputs)

    def abort(self) -> None:
        """Leave no unfinished shard."""
        if self._shard is not None:
            self._shard.abort()


def _merge(job: EncodingJob, settings: dict[str, Any], found: Sequence[tuple[Any, Description]], num_inputs: int) -> Manifest:
    whole = Description()
    for _, description in found:
        whole.merge(description)
    _check_unreadable(job, whole.num_unreadable, num_inputs, None)
    shards = tuple(shard for shard, _ in found if shard is not None)
    if not shards:
        raise UserError(f"{job.reader.name}: none of the {num_inputs} inputs of {job.split!r} gives a sample; check --root.")
    skipped, excluded = (
        tuple(Skipped(key=u["key"], reason=u["reason"]) for u in whole.unread if u["excluded"] == on_purpose)
        for on_purpose in (False, True)
    )
    codec = job.encoder.codec
    return Manifest(
        dataset=job.reader.name,
        split=job.split,
        task=job.layout.task,
        resolution=job.layout.resolution,
        num_samples=sum(shard.num_samples for shard in shards),
        shards=shards,
        members=whole.members,
        vae=codec.record,
        reader_version=str(job.reader.version),
        filter=f"{len(excluded)} inputs left out by the set's own filter" if excluded else "",
        mirrored=job.layout.mirrored,
        synthetic=job.synthetic,
        encoding=settings,
        skipped=skipped,
        num_skipped=len(skipped),
        excluded=excluded,
        class_names=tuple(job.reader.class_names),
        statistics=whole.statistics(),
    )
