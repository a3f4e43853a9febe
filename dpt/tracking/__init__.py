"""MLflow, kept out of the way: records go to a local spool first, and a process beside the run sends them on."""

from dpt.tracking.run import Run, start_run, watch_node

__all__ = ["Run", "start_run", "watch_node"]
