"""Two MLflow runs side by side: python examples/compare_runs.py sqlite:///mlflow.db RUN OTHER (ids or names)."""

import sys

from dpt.tracking.read import load_runs

uri, *names = sys.argv[1:]
runs = load_runs(uri, run_ids=names)
print("run".ljust(50), *(run.label.rjust(20) for run in runs))
for name in sorted(set.intersection(*(set(run.params) for run in runs))):  # settings that differ
    if len({run.params[name] for run in runs}) > 1:
        print(name.ljust(50), *(run.params[name].rjust(20) for run in runs))
for name in sorted(set.intersection(*(set(run.metrics) for run in runs))):  # last values
    print(name.ljust(50), *(f"{run.metrics[name]:20.5g}" for run in runs))
for run in runs:
    losses = run.history("train/loss")
    print(f"{run.label}: {len(losses)} points of train/loss {run.url}".rstrip())
