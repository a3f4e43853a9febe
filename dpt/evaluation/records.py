"""What an evaluation has scored so far: one JSON line a sample, so that an interrupted run goes on, and the final table."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True, kw_only=True, order=True)
class Setting:
    """What was scored: the model with so many steps and members, or a reference that needs no sampling.

    kind: "model"; "baseline", what a prediction must beat (the best constant depth, no motion, the visible mask); "ceiling",
    the truth through the task's image code and the VAE, which no model of these latents can be expected to pass; "code", the
    same without the VAE, where the set has the picture (amodal: thresholding the true whole object); "given", a ready-made
    prediction.
    """

    kind: str = "model"
    steps: int = 0
    ensemble: int = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample's scores under one setting; `metrics` is empty if no pixel counts."""

    index: int
    key: str
    setting: Setting
    metrics: dict[str, float] = field(default_factory=dict)
    macs: float = 0.0
    """Multiply-accumulates of this prediction."""


BASELINE, CEILING, CODE, GIVEN = (Setting(kind=kind) for kind in ("baseline", "ceiling", "code", "given"))
REFERENCES = (BASELINE, CEILING, CODE)
"""What models are compared with."""


class RecordLog:
    """The records of one set under one fingerprint (everything but steps and ensemble that they depend on), on disk.

    Every rank appends to a file of its own; a line counts once it is whole.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], *, rank: int = 0) -> None:
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self._folder = folder / "parts" / digest
        self._rank = rank
        self._file: IO[str] | None = None

    def read(self) -> dict[tuple[int, Setting], Record]:
        """What earlier runs with the same fingerprint have scored, whatever their number of ranks, by sample and setting."""
        records = (record for path in sorted(self._folder.glob("*.jsonl")) for record in _read(path))
        return {(record.index, record.setting): record for record in records}

    def add(self, records: Iterable[Record]) -> None:
        """Keep one sample's records, together."""
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            number = len(list(self._folder.glob(f"{self._rank:05d}-*.jsonl")))
            self._file = (self._folder / f"{self._rank:05d}-{number:04d}.jsonl").open("x", encoding="utf-8")
        self._file.write(json.dumps([_to_json(r) for r in records]) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _to_json(record: Record) -> list[Any]:
    setting = record.setting
    return [record.index, record.key, [setting.kind, setting.steps, setting.ensemble], record.metrics, record.macs]


def _read(path: Path) -> Iterator[Record]:
    """The records in a file; a last line that a kill left torn is no record."""
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows = json.loads(line)
        except json.JSONDecodeError:
            continue
        for index, key, (kind, steps, ensemble), metrics, macs in rows:
            setting = Setting(kind=kind, steps=steps, ensemble=ensemble)
            yield Record(index=index, key=key, setting=setting, metrics=metrics, macs=macs)


def list_sha256(records: Iterable[Record]) -> str:
    """Hash of the keys of the scored samples, in the set's order: equal hashes mean the same list of images."""
    keys = dict(sorted({r.index: r.key for r in records}.items()))
    return hashlib.sha256("\n".join(keys.values()).encode()).hexdigest()


def write_parquet(records: Iterable[Record], path: Path) -> None:
    """One row per sample and setting: index, key, kind, steps, ensemble, macs, and each metric (null where nothing counts)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = sorted(records, key=lambda r: (r.setting, r.index))
    names = dict.fromkeys(name for r in records for name in r.metrics)
    columns: dict[str, list[Any]] = {
        "index": [r.index for r in records],
        "key": [r.key for r in records],
        "kind": [r.setting.kind for r in records],
        "steps": [r.setting.steps for r in records],
        "ensemble": [r.setting.ensemble for r in records],
        "macs": [r.macs for r in records],
        **{name: [r.metrics.get(name) for r in records] for name in names},
    }
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)
