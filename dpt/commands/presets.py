"""Model sizes by name: parameters, multiply-accumulates of one forward pass, and bytes per rank when training."""

import argparse
import json

from dpt.models.costs import preset_table
from dpt.scaling.results import format_cells, show_macs


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print every column, numbers in full, as JSON")
    parser.add_argument("--ranks", type=int, default=1, help="ranks (default: %(default)s)")
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts of a layer (default: %(default)s)")
    parser.add_argument("--zero", type=int, default=1, choices=range(4), help="ZeRO stage (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=32, help="samples per rank and step (default: %(default)s)")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"), help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    rows = preset_table(
        ranks=arguments.ranks,
        ep_size=arguments.ep,
        zero_stage=arguments.zero,
        micro_batch_size=arguments.micro_batch,
        precision=arguments.precision,
    )
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    header = [
        "preset",
        "params",
        "active",
        "MACs 256 px",
        "MACs 512 px",
        "states GiB",
        "activations",
        "checkpointed",
        "total GiB",
    ]
    cells = []
    for row in rows:
        states = sum(row[f"bytes_{name}"] for name in ("weights", "master_weights", "gradients", "moments", "ema"))
        memory = [states, row["bytes_activations"], row["bytes_activations_checkpointed"], row["bytes_total"]]
        macs = [show_macs(row[f"forward_macs_{size}px"]) for size in (256, 512)]
        params = [f"{row[f'params_{kind}'] / 1e6:,.1f} M" for kind in ("total", "active")]
        cells.append([row["preset"], *params, *macs, *(f"{value / 2**30:.2f}" for value in memory)])
    print(format_cells(header, cells))
    print(
        f"\nMACs: one forward pass of one image. Memory: on each of {arguments.ranks} ranks, 256 px, {arguments.precision}, "
        f"EP {arguments.ep}, ZeRO {arguments.zero}, micro batch {arguments.micro_batch};\n"
        "activations without and with recomputing each block; communication buffers and the device's context come on top."
    )
