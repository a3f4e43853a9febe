"""Training on many GPUs, on paper: the fastest layout for each number of GPUs, what it costs, and its recipe.

Rates of the machine default to the data sheet of nodes of eight H100; `--efficiency` is what one GPU alone reaches: measure it
with `python -m benchmarks.train_step` and give it here.
"""

import argparse
import dataclasses
import json

from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, Range, numeric
from dpt.config.presets import preset_values
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.scaling.cluster import Cluster, Projection, best_layout, project
from dpt.scaling.results import format_cells

_RATES = {
    "gpus_per_node": "GPUs of a node",
    "peak_flops": "FLOP a second of one GPU, bf16 matrix products",
    "efficiency": "share of the peak that a GPU reaches in a step without communication",
    "memory_bytes": "bytes of a GPU's memory",
    "memory_bandwidth": "bytes a second of a GPU's memory",
    "node_bandwidth": "bytes a second from a GPU to others of its node",
    "network_bandwidth": "bytes a second from a GPU to other nodes",
    "latency_s": "seconds that a message between two GPUs takes at least",
    "host_bandwidth": "bytes a second from a GPU to its host's memory",
    "storage_bandwidth": "bytes a second of the shared file system, all nodes together",
    "jitter": "relative standard deviation of a rank's compute time from step to step",
}
"""What `Cluster`'s fields are, with their units."""
_RANGES = {
    "gpus_per_node": AT_LEAST_1,
    "efficiency": Range(above=0, most=1),
    "latency_s": NOT_NEGATIVE,
    "jitter": NOT_NEGATIVE,
}
"""What they may be; the others are positive."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", help="network, as in `dpt presets`")
    parser.add_argument(
        "--gpus", type=numeric(int, AT_LEAST_1), nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024], help="numbers of GPUs"
    )
    parser.add_argument(
        "--input-size", type=numeric(int, AT_LEAST_1), default=32, help="side of the latents (default: %(default)s, 256 px)"
    )
    parser.add_argument(
        "--batch", type=numeric(int, AT_LEAST_1), default=256, help="global batch, at least (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-per-gpu", type=numeric(int, AT_LEAST_1), default=4, help="samples a GPU, at least (default: %(default)s)"
    )
    parser.add_argument(
        "--ep",
        type=numeric(int, NOT_NEGATIVE),
        default=0,
        help="ranks that share the experts of a layer (default: the fastest)",
    )
    parser.add_argument("--zero", type=int, default=0, choices=range(4), help="ZeRO stage (default: the fastest)")
    parser.add_argument(
        "--imbalance", type=numeric(float, AT_LEAST_1), default=1.1, help="load of the fullest rank (default: %(default)s)"
    )
    parser.add_argument("--recipes", action="store_true", help="print the fields of each recipe")
    for field in dataclasses.fields(Cluster):
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default,
                            type=numeric(type(field.default), _RANGES.get(field.name, POSITIVE)),
                            help=f"{_RATES[field.name]} (default: %(default)g)")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    config = ModelConfig(**preset_values(arguments.preset) | {"input_size": arguments.input_size})
    cluster = Cluster(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Cluster)})
    found: list[Projection] = []
    for gpus in arguments.gpus:
        batch = max(arguments.batch, arguments.batch_per_gpu * gpus)
        try:
            best = best_layout(config, gpus, batch, cluster, ep_size=arguments.ep, zero_stage=arguments.zero)
        except UserError as error:
            print(error)
            continue
        found.append(project(config, best.layout, cluster, imbalance=arguments.imbalance))
    if not found:
        return
    print(_steps(found))
    print("\n" + _runs(found))
    if arguments.recipes:
        print()
        for one in found:
            print(f"{one.layout.ranks} GPUs: {json.dumps(one.layout.recipe())}")


def _steps(found: list[Projection]) -> str:
    header = ["GPUs", "batch", "EP", "ZeRO", "micro", "recomputed", "GiB", "step ms", "compute", "tokens", "gradients",
              "optimizer", "stragglers", "samples/s", "MFU", "of one GPU"]  # fmt: skip
    cells = []
    for one in found:
        layout = one.layout
        parts = (one.step_s, one.compute_s, one.tokens_s, one.gradients_s, one.optimizer_s, one.straggling_s)
        cells.append([
            str(layout.ranks), str(layout.global_batch_size), str(layout.ep_size), str(layout.zero_stage),
            f"{layout.micro_batch_size} x {layout.accumulation}", "yes" if layout.activation_checkpointing else "no",
            f"{one.memory_bytes / 2**30:.1f}", *(f"{1e3 * part:.1f}" for part in parts), f"{one.samples_per_second:,.0f}",
            f"{one.mfu:.2f}", f"{one.efficiency:.2f}",
        ])  # fmt: skip
    return format_cells(header, cells)


def _runs(found: list[Projection]) -> str:
    header = ["GPUs", "shards MB/s", "checkpoint GB", "pause s", "write s", "MLflow numbers/s", "400k steps, days"]
    cells = [
        [
            str(one.layout.ranks), f"{one.read_bytes_per_second / 1e6:,.1f}", f"{one.checkpoint_bytes / 1e9:,.1f}",
            f"{one.checkpoint_pause_s:.2f}", f"{one.checkpoint_write_s:.1f}", f"{one.points_per_second():.1f}",
            f"{400_000 * one.step_s / 86_400:.1f}",
        ]
        for one in found
    ]  # fmt: skip
    return format_cells(header, cells)
