"""List model sizes by name: parameters, multiply-accumulates, and bytes per rank when training."""

import argparse
import json
from typing import Any

from dpt.config.numbers import COUNT
from dpt.models.memory import preset_table
from dpt.scaling.results import format_cells, show_macs


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", action="store_true", help="print all columns, with full numbers, as JSON")
    add("--ranks", type=COUNT, default=1, help="ranks")
    add("--ep", type=COUNT, default=1, help="ranks that share a layer's experts")
    add("--zero", type=int, default=1, choices=range(4), help="ZeRO stage")
    add("--micro-batch", type=COUNT, default=32, help="samples per rank and forward pass")
    add("--precision", default="bf16", choices=("fp32", "bf16", "fp16"), help="of training")


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
    header = ["preset", "params", "active", "forward 256 px", "512 px", "training 256 px", "512 px"]
    print(format_cells(header, [[row["preset"], *_sizes(row)] for row in rows]))
    print("\nMACs (multiply-accumulates) of one image: forward, and forward with backward.\n")
    parts = ["weights", "gradients", "moments", "EMA", "buckets", "activations", "(checkpointed)"]
    header = ["preset", *parts, "total", "(ckpt.)"]
    print(format_cells(header, [[row["preset"], *_memory(row)] for row in rows]))
    print(
        f"\nGiB per rank, on {arguments.ranks} rank{'s' * (arguments.ranks > 1)}: 256 px, {arguments.precision}, EP "
        f"{arguments.ep} (dense networks: 1), ZeRO {arguments.zero}, micro batch {arguments.micro_batch}.\n"
        "weights: with the optimizer's float32 copy; buckets: buffers for reducing gradients; (checkpointed): with activation\n"
        "checkpointing. The device's context comes on top."
    )


def _sizes(row: dict[str, Any]) -> list[str]:
    params = [f"{row[f'params_{kind}'] / 1e6:,.1f} M" for kind in ("total", "active")]
    return [*params, *(show_macs(row[f"{kind}_macs_{size}px"]) for kind in ("forward", "training") for size in (256, 512))]


def _memory(row: dict[str, Any]) -> list[str]:
    weights = row["bytes_weights"] + row["bytes_master_weights"]
    names = ("gradients", "moments", "ema", "buckets", "activations", "activations_checkpointed", "total", "total_checkpointed")
    return [f"{value / 2**30:.2f}" for value in (weights, *(row[f"bytes_{name}"] for name in names))]
