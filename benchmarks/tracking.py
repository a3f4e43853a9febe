"""What records cost the training process, and how fast they reach MLflow, beside MLflow's own calls in the same run.

python -m benchmarks.tracking [--points 1000000] [--step-ms 100] [--json FILE]
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
    """Milliseconds of the caller for one record: median, 99th percentile, and processor time."""
    walls = []
    processor = time.process_time()
    for step in range(count):
        begun = time.perf_counter()
        log(values(step), step)
        walls.append(time.perf_counter() - begun)
    processor = time.process_time() - processor
    walls.sort()
    return {
        "median_ms": 1e3 * statistics.median(walls),
        "p99_ms": 1e3 * walls[int(0.99 * (count - 1))],
        "processor_ms": 1e3 * processor / count,
    }


def mlflow_calls(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """MLflow's own log_metrics, waiting and not waiting, in this process."""
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
    """Send a spool of so many points to a fresh run: seconds, points a second, and processor seconds."""
    spool = Spool(folder / "long" / "tracking", "long")
    start = {
        "uri": f"sqlite:///{folder}/mlflow.db",
        "experiment": "benchmark",
        "name": "long",
        "stage": "pretrain",
        "parents": [],
    }
    spool.append({"kind": "start", "time": 0, "run_id": "long", "tags": {}, **start})
    for step in range(points // METRICS):
        spool.append({"kind": "metrics", "time": step, "step": step, "values": values(step)})
    spool.append({"kind": "finish", "time": points, "status": "FINISHED"})
    before = resource.getrusage(resource.RUSAGE_SELF)
    begun = time.perf_counter()
    Sender(spool).send()
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (run,) = load_runs(f"sqlite:///{folder}/mlflow.db", "benchmark", ["long"])
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
        rows = {"dpt.tracking": per_record(run.log_metrics, arguments.records)}
        run.finish()
        rows |= mlflow_calls(folder, max(50, arguments.records // 20))
        long = send_all(folder, arguments.points)
    print(
        f"{'one record of ' + str(METRICS) + ' numbers':40}{'median ms':>12}{'p99 ms':>10}{'CPU ms':>10}{'share of a step':>18}"
    )
    for label, row in rows.items():
        row["share_of_step"] = row["median_ms"] / (arguments.log_every * arguments.step_ms)
        print(f"{label:40}{row['median_ms']:12.3f}{row['p99_ms']:10.3f}{row['processor_ms']:10.3f}{row['share_of_step']:18.4%}")
    print(
        f"a run of {long['points']:,} points: spool {long['spool_mb']:.0f} MB, sent to SQLite in {long['seconds']:.0f} s "
        f"({long['points_per_second']:,.0f} points/s, {long['processor_seconds']:.0f} s of processor time beside the training)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"records": rows, "long_run": long}, indent=1) + "\n")


if __name__ == "__main__":
    main()
