"""Cost of records to the training process, and how fast they reach MLflow, beside MLflow's own calls in the same run.

python -m benchmarks.tracking [--points 1000000] [--step-ms 100] [--json FILE]
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness
from dpt.config.sections import TrackingConfig
from dpt.tracking import Run, start_run
from dpt.tracking.delivery import Sender
from dpt.tracking.read import load_runs
from dpt.tracking.spool import Spool

METRICS = 12
"""Numbers in one record, as training writes them."""


def values(step: int) -> dict[str, float]:
    return {f"train/metric_{i}": step + i / METRICS for i in range(METRICS)}


def open_run(folder: Path, name: str) -> Run:
    config = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="benchmark")
    return start_run(config, stage="pretrain", name=name, params={}, parents=[], output_dir=folder / name, tags={})


def per_record(log: Callable[[dict[str, float], int], object], count: int) -> dict[str, float]:
    """Caller's milliseconds per record: median, 99th percentile, and processor time."""
    walls = []
    processor = time.process_time()
    for step in range(count):
        begun = time.perf_counter()
        log(values(step), step)
        walls.append(time.perf_counter() - begun)
    processor = time.process_time() - processor
    walls.sort()
    median, late = statistics.median(walls), walls[int(0.99 * (count - 1))]
    return {"median_ms": 1e3 * median, "p99_ms": 1e3 * late, "processor_ms": 1e3 * processor / count}


def mlflow_calls(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Measure MLflow's own log_metrics, waiting and not waiting, in this process."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment("benchmark")
    results = {}
    for name, synchronous in (("mlflow.log_metrics", True), ("mlflow.log_metrics, synchronous=False", False)):
        with mlflow.start_run():
            results[name] = per_record(lambda m, s, wait=synchronous: mlflow.log_metrics(m, s, synchronous=wait), count)  # type: ignore[misc]
    return results


def send_all(folder: Path, points: int) -> dict[str, float]:
    """Send a spool of `points` points to a fresh run: seconds, points per second, and processor seconds."""
    spool = Spool(folder / "long" / "tracking", "long")
    uri = f"sqlite:///{folder}/mlflow.db"
    start = {"uri": uri, "experiment": "benchmark", "name": "long", "stage": "pretrain", "parents": [], "tags": {}}
    spool.append({"kind": "start", "time": 0, "run_id": "long", **start})
    for step in range(points // METRICS):
        spool.append({"kind": "metrics", "time": step, "step": step, "values": values(step)})
    spool.append({"kind": "finish", "time": points, "status": "FINISHED"})
    before = resource.getrusage(resource.RUSAGE_SELF)
    begun = time.perf_counter()
    Sender(spool).send()
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (run,) = load_runs(uri, "benchmark", ["long"])
    assert len(run.history("train/metric_0")) == points // METRICS
    return {
        "points": points,
        "seconds": seconds,
        "points_per_second": points / seconds,
        "processor_seconds": processor,
        "spool_mb": spool.path.stat().st_size / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=1_000_000, help="metric points of a long run")
    parser.add_argument("--records", type=int, default=2000, help="records of each way of logging")
    parser.add_argument("--step-ms", type=float, default=100.0, help="a training step, for the shares")
    parser.add_argument("--log-every", type=int, default=10, help="steps between records")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = open_run(folder, "ours")
        records = {"dpt.tracking": per_record(run.log_metrics, arguments.records)}
        run.finish()
        records |= mlflow_calls(folder, max(50, arguments.records // 20))
        long = send_all(folder, arguments.points)
    share = 1 / (arguments.log_every * arguments.step_ms)
    rows = [
        {"case": f"one record of {METRICS} numbers", "what": name, **figures, "share_of_step": figures["median_ms"] * share}
        for name, figures in records.items()
    ]
    harness.finish("tracking", [*rows, {"case": "a long run", "what": "sent to SQLite", **long}], arguments)


if __name__ == "__main__":
    main()
