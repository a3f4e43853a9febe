"""Accept a machine with a GPU, within ten minutes: does it compute what the definitions say, and how fast.

python -m benchmarks.gpu [--parts dense moe ...] [--json FILE] [--markdown FILE] [--toy] [--without-quickstart]

Each part runs in a process of its own: parity (experts, attention, bf16 losses), kernels (attention, grouped products),
dense and moe (whole training steps, eager and compiled: images per second, MFU against the data sheet's peak, the share of the
measured matrix peak, memory against the plan, the share of the time that the GPU is busy), finetuning (the same of
ds_configs/finetune_depth.json), sampling, evaluation, encoding,
checkpoints, loading, quickstart. It needs torch 2.11 or newer and no MLflow. `--toy` runs the same at toy size on a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness

PARTS = (
    "parity", "kernels", "dense", "moe", "finetuning",
    "sampling", "evaluation", "encoding", "checkpoints", "loading", "quickstart",
)  # fmt: skip
LIMIT_S = {"quickstart": 300.0, "moe": 240.0}
"""Seconds that a part may take; 150 by default."""


def run_part(name: str, demand: float | None) -> list[harness.Row]:
    """The rows of one part, measured in this process."""
    from benchmarks.gpu import kernels, parity, pipeline, training

    parts: dict[str, Callable[[], list[harness.Row]]] = {
        "parity": parity.measure,
        "kernels": kernels.measure,
        "dense": lambda: training.measure("dense"),
        "moe": lambda: training.measure("moe"),
        "finetuning": lambda: training.measure_recipe("finetune_depth"),
        "sampling": pipeline.sampling,
        "evaluation": pipeline.evaluation,
        "encoding": pipeline.encoding,
        "checkpoints": pipeline.checkpoints,
        "loading": lambda: pipeline.loading(demand),
        "quickstart": quickstart,
    }
    try:
        return parts[name]()
    except torch.OutOfMemoryError:
        if name in training.CASES:  # their memory is planned: a wrong plan must not pass
            raise
        return [{"case": name, "what": training.TOO_LARGE}]


def quickstart() -> list[harness.Row]:
    """Run the quickstart as shipped, into a temporary folder; its depth's AbsRel (five members) after pre-training."""
    with tempfile.TemporaryDirectory(prefix="dpt-quickstart-") as folder:
        begin = time.perf_counter()
        command = [sys.executable, "launchers/quickstart.py", "--out", folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S["quickstart"])
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise RuntimeError(done.stdout[-1500:] + done.stderr[-1500:])
        summary = json.loads((Path(folder) / "evaluate" / "depth" / "summary.json").read_text())
    (one,) = summary["sets"].values()
    best = max(one["results"], key=lambda result: result["ensemble"])
    return [{"case": "quickstart, depth", "what": harness.OURS, "median_s": seconds, "abs_rel": best["metrics"]["abs_rel"]}]


def run_in_process(name: str, demand: float | None) -> list[harness.Row]:
    """The rows of one part, run in its own process; a row with the reason if it fails or takes too long."""
    with tempfile.TemporaryDirectory(prefix="dpt-gpu-") as folder:
        result = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--only", name, "--json", str(result)]
        command += ["--demand", str(demand)] if demand else []
        begin = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S.get(name, 150.0))
        except subprocess.TimeoutExpired:
            return [{"case": name, "what": f"failed: not done after {LIMIT_S.get(name, 150.0):.0f} s"}]
        if done.returncode:
            print(done.stdout[-3000:] + done.stderr[-6000:], file=sys.stderr)
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return [{"case": name, "what": f"failed: {reason[:160]}"}]
        rows: list[harness.Row] = json.loads(result.read_text())
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        return rows


def markdown(rows: Sequence[harness.Row], machine: dict[str, Any]) -> str:
    """A table for docs/performance.md."""
    names = {
        "median_s": "seconds", "images_per_s": "images/s",
        "mfu": "MFU (data sheet)",
        "matrix_peak_share": "of the measured peak",
        "gpu_busy": "GPU busy", "tflops_per_s": "TFLOP/s", "dispatch_share": "dispatch",
        "peak_gib": "peak GiB", "plan_gib": "plan GiB",
        "share_of_bound": "of the bare VAE", "difference": "difference", "limit": "limit",
        "times_the_step": "of the step's demand", "abs_rel": "AbsRel",
    }  # fmt: skip
    used = [key for key in names if any(row.get(key) is not None for row in rows)]
    lines = [", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    lines += ["| case | what | " + " | ".join(names[key] for key in used) + " |", "|---" * (len(used) + 2) + "|"]
    for row in rows:
        cells = [f"{row[key]:.4g}" if isinstance(row.get(key), int | float) else "" for key in used]
        lines.append("| " + " | ".join([str(row["case"]), str(row["what"]), *cells]) + " |")
    return "\n".join(lines) + "\n"


def failures(rows: Sequence[harness.Row]) -> list[str]:
    """Checks that did not pass or did not run."""
    failed = [f"{row['case']}: {row['what']}" for row in rows if str(row["what"]).startswith("failed")]
    return failed + [
        f"{row['what']}: {row['difference']:.2g} > {row['limit']:.2g}" for row in rows if not row.get("passed", True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts, print the table, write JSON and Markdown; exit code 1 if a part failed or a parity check did not pass."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write a table for docs/performance.md here")
    parser.add_argument("--toy", action="store_true", help="on a CPU, at sizes that take seconds")
    parser.add_argument("--without-quickstart", action="store_true", help="leave out the part that takes longest")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--demand", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.only:
        arguments.json.write_text(json.dumps(run_part(arguments.only, arguments.demand)))
        sys.stdout.flush()
        os._exit(0)  # do not wait for threads of NCCL and compilers
    if not torch.cuda.is_available() and not arguments.toy:
        print("benchmarks.gpu: there is no CUDA GPU here; --toy runs the same parts at small size on the CPU.", file=sys.stderr)
        sys.exit(2)
    rows: list[harness.Row] = []
    demand: float | None = None
    found = harness.machine()
    for name in arguments.parts:
        if name == "quickstart" and (arguments.toy or arguments.without_quickstart):
            continue
        rows += run_in_process(name, demand)
        rates = [row["images_per_s"] for row in rows if "XL/2," in row["case"] and "images_per_s" in row]
        demand = max(rates, default=None)
        if arguments.json is not None:  # after each part, so that nothing is lost if a later one is stopped
            arguments.json.write_text(json.dumps({"benchmark": "gpu", "machine": found, "results": rows}, indent=1) + "\n")
        if arguments.markdown is not None:
            arguments.markdown.write_text(markdown(rows, found))
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    print(harness.table(rows))
    if failed := failures(rows):
        print("\n".join(["not passed:", *failed]), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
