"""Scores of an evaluation so far, one JSON line per sample, from which an interrupted run resumes, and the final table."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpt.evaluation.files import JsonLines, fingerprint, write_atomically


@dataclass(frozen=True, kw_only=True, order=True)
class Setting:
    """Setting that was scored: the model at a number of steps and members, or a reference that needs no sampling.

    kind: "model"; "baseline", what a prediction must beat (the best constant depth, no motion, the visible mask); "ceiling",
    the truth through the task's image code and the VAE, which no model of these latents can be expected to beat; "code", the
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
"""Settings that models are compared with."""


class RecordLog(JsonLines):
    """The records of one set under one fingerprint (all that they depend on except steps and ensemble), one sample per line."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(folder / "parts" / fingerprint(settings))

    def read(self) -> dict[tuple[int, Setting], Record]:
        """Read the scores of earlier runs with the same fingerprint, on any number of ranks, by sample and setting."""
        found: dict[tuple[int, Setting], Record] = {}
        for rows in self.values():
            for index, key, (kind, steps, ensemble), metrics, macs in rows:
                setting = Setting(kind=kind, steps=steps, ensemble=ensemble)
                found[index, setting] = Record(index=index, key=key, setting=setting, metrics=metrics, macs=macs)
        return found

    def add(self, records: Iterable[Record]) -> None:
        """Append one sample's records, together."""
        settings = ((r, [r.setting.kind, r.setting.steps, r.setting.ensemble]) for r in records)
        self.append([[r.index, r.key, setting, r.metrics, r.macs] for r, setting in settings])


def list_sha256(records: Iterable[Record]) -> str:
    """Hash of the keys of the scored samples, in the set's order: equal hashes mean the same list of images."""
    keys = dict(sorted({r.index: r.key for r in records}.items()))
    return hashlib.sha256("\n".join(keys.values()).encode()).hexdigest()


def write_parquet(records: Iterable[Record], path: Path) -> None:
    """Write a row per sample and setting: index, key, kind, steps, ensemble, macs, each metric (null if nothing counts)."""
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
    write_atomically(path, lambda temporary: pq.write_table(pa.table(columns), temporary))
