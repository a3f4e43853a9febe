"""`make bench`: every benchmark, one after the other, each in a process of its own; exit code 1 if one fails.

python -m benchmarks [--json FOLDER]; one alone: `python -m benchmarks.NAME --help`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = (
    "train_step", "moe_layer", "optimizer_ema", "loader", "encode", "sample", "checkpoint", "scaling", "tracking", "startup",
    "profile",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write each one's results into this folder, as NAME.json")
    folder = parser.parse_args().json
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in NAMES:
        print(f"\n== {name}", flush=True)
        results = [] if folder is None else ["--json", str(folder / f"{name}.json")]
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *results]).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"these benchmarks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
