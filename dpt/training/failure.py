"""End a run that cannot continue, reporting what is known of the cause."""

import contextlib
import json
import math
from pathlib import Path

from dpt import distributed
from dpt.training.engine import Engine
from dpt.training.fragments import fragments


class TrainingFailed(Exception):
    """Training cannot continue on any rank; the text is the report."""


def failure_report(engine: Engine, output_dir: Path, step: int, loss: float, keys: list[str], rewound: bool) -> str:
    """Explain why steps up to `step` were not finite, as far as known; details go to `output_dir`/failure.json. Collective.

    `loss`: the last one; `keys`: its samples on this rank; `rewound`: whether the run has rewound before.
    """
    squares = {f.name: float(f.master().double().square().sum()) for f in fragments(engine.deepspeed) if f.owned}
    names = sorted({name for part in distributed.gather_objects(sorted(squares)) for name in part})
    norms = {n: math.sqrt(v) for n, v in distributed.all_reduce_sum({name: squares.get(name, 0.0) for name in names}).items()}
    largest = sorted(norms, key=lambda n: norms[n] if math.isfinite(norms[n]) else math.inf, reverse=True)[:8]
    report = {
        "step": step,
        "loss": _json(loss),
        "largest_weight_norms": {name: _json(norms[name]) for name in largest},
        "sample_keys": [key for part in distributed.gather_objects(keys) for key in part],
    }
    path = output_dir / "failure.json"
    if distributed.is_main():
        with contextlib.suppress(OSError):  # a full disk must not end rank 0 otherwise than the others
            path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    again = "even after rewinding to the last checkpoint" if rewound else "and there is no checkpoint to rewind to"
    return (
        f"too many steps in a row up to step {step} were not finite (loss {loss}), {again}. Largest weight norms: "
        f"{', '.join(f'{name} {norms[name]:.3g}' for name in largest[:3])}. Sample keys and more: {path}"
    )


def _json(value: float) -> float | str:
    """The value as JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else str(value)
