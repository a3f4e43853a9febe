"""Model the cost of training on many GPUs: the fastest layout for each number of GPUs, its cost, and its recipe.

Rates default to the data sheet of nodes of eight H100s. Measure `--efficiency`, that of a single GPU, with
`python -m benchmarks.train_step`. The step is the paper's: methods beyond it (docs/methods.md) are not counted.
"""

import argparse
import dataclasses
import json

from dpt.config.numbers import AT_LEAST_1, COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, Range, numeric
from dpt.config.presets import preset_values
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.scaling.cluster import Cluster, Projection, best_layout, project
from dpt.scaling.results import format_cells

_RATES = {
    "gpus_per_node": "GPUs per node",
    "peak_flops": "bf16 FLOP/s of one GPU",
    "efficiency": "share of the peak that a GPU reaches in a step without communication",
    "memory_bytes": "GPU memory, bytes",
    "memory_bandwidth": "bandwidth of a GPU's memory, bytes/s",
    "node_bandwidth": "bandwidth from a GPU to others in its node, bytes/s",
    "network_bandwidth": "bandwidth from a GPU to other nodes, bytes/s",
    "latency_s": "least time of a message between two GPUs, seconds",
    "host_bandwidth": "bandwidth from a GPU to host memory, bytes/s",
    "storage_bandwidth": "bandwidth of the shared file system to all nodes, bytes/s",
    "jitter": "relative standard deviation of a rank's compute time between steps",
}
"""Meaning of `Cluster`'s fields."""
_RANGES = {"gpus_per_node": AT_LEAST_1, "efficiency": Range(above=0, most=1), "latency_s": NOT_NEGATIVE, "jitter": NOT_NEGATIVE}
"""Allowed ranges of those fields; the others must be positive."""


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("preset", help="network, as in `dpt presets`")
    add("--gpus", type=COUNT, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024], help="numbers of GPUs")
    add("--input-size", type=COUNT, default=32, help="side of the latents (default: %(default)s, for 256 px)")
    add("--batch", type=COUNT, default=256, help="least global batch size")
    add("--batch-per-gpu", type=COUNT, default=4, help="least samples per GPU")
    add("--ep", type=NATURAL, default=0, help="ranks that share a layer's experts (default: the fastest)")
    add("--zero", type=int, default=0, choices=range(4), help="ZeRO stage (default: the fastest)")
    add("--imbalance", type=numeric(float, AT_LEAST_1), default=1.1, help="load of the fullest rank over the mean")
    add("--recipes", action="store_true", help="print the fields of each recipe")
    for field in dataclasses.fields(Cluster):
        number = numeric(type(field.default), _RANGES.get(field.name, POSITIVE))
        add(f"--{field.name.replace('_', '-')}", type=number, default=field.default, help=_RATES[field.name])


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
