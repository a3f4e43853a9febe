"""Sample a node's activity with MLflow's own monitors, for the process beside a run."""

import contextlib
import time
from typing import Any

from dpt.tracking.spool import Spool

PREFIX = "system/"


class SystemRecords:
    """Appends the node's processor, memory, disk, network and GPU figures to a spool at a fixed interval.

    node: distinguishes nodes (`system/NODE/cpu_utilization_percentage`); empty for a run on one node, as MLflow names them.
    The figures go through the spool, like all records: an outage of the store loses none, and the training never waits.
    """

    def __init__(self, spool: Spool, *, every: float, node: str = "") -> None:
        self._spool, self._every = spool, every
        self._prefix = PREFIX + (f"{node}/" if node else "")
        self._step = 1 + max((s for name, s in spool.last_steps().items() if name.startswith(self._prefix)), default=-1)
        self._next = time.monotonic() + every
        self._monitors: list[Any] = []

    def sample(self) -> bool:
        """Take a sample if due; return whether it was."""
        if time.monotonic() < self._next:
            return False
        self._monitors = self._monitors or _monitors()
        self._next = time.monotonic() + self._every
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        record = {"step": self._step, "values": {self._prefix + name: float(value) for name, value in values.items()}}
        with contextlib.suppress(OSError):  # a full disk
            self._spool.append({"kind": "metrics", "time": int(time.time() * 1000), "run_id": self._spool.run_id, **record})
        self._step += 1
        return True


def _monitors() -> list[Any]:
    """MLflow's monitors for this node's hardware."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        with contextlib.suppress(Exception):  # no such GPU, or no library that reads it
            return [*found, kind()]
    return found
