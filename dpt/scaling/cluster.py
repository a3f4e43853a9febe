"""Cost of a training step on many GPUs: communication, memory and time as functions of network, layout and machine.

An analytical model from `dpt.models.costs` and a machine's rates; `benchmarks/scaling.py` compares its traffic with what ranks
really exchange. Times are those of ring collectives (Thakur et al., "Optimization of Collective Communication Operations in
MPICH", 2005): n ranks need 2 (n - 1) / n of the bytes for an all-reduce and (n - 1) / n for an all-gather or an all-to-all.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models import costs
from dpt.models.memory import Precision, memory

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]

STATE_BYTES = 16
"""Checkpoint bytes per parameter: weight, two moments and one average, float32."""
METRICS_PER_RECORD = 20
"""Numbers in a training record."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A machine's rates in bytes and FLOP per second, per GPU and direction. Defaults: data sheet of nodes with eight H100s."""

    gpus_per_node: int = 8
    peak_flops: float = 989e12
    """Peak rate of bf16 matrix products."""
    efficiency: float = 0.4
    """Share of the peak that one GPU reaches in a step without communication. An assumption until measured."""
    memory_bytes: float = 80e9
    memory_bandwidth: float = 3.35e12
    node_bandwidth: float = 450e9
    """Bandwidth to GPUs of the same node."""
    network_bandwidth: float = 50e9
    """Bandwidth to other nodes."""
    latency_s: float = 10e-6
    """Latency of a message between two GPUs."""
    host_bandwidth: float = 50e9
    """Bandwidth from GPU to host memory."""
    storage_bandwidth: float = 20e9
    """Bandwidth of the shared file system, all nodes together."""
    jitter: float = 0.01
    """Relative standard deviation of a rank's compute time from step to step."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layout of a step over ranks."""

    ranks: int
    micro_batch_size: int
    accumulation: int = 1
    ep_size: int = 1
    zero_stage: int = 1
    activation_checkpointing: bool = False
    precision: Precision = "bf16"
    overlap: bool = True
    """zero_optimization.overlap_comm: gradients travel while others are still computed."""

    @property
    def global_batch_size(self) -> int:
        return self.ranks * self.micro_batch_size * self.accumulation

    def recipe(self) -> dict[str, Any]:
        """The equivalent recipe fields."""
        fields: dict[str, Any] = {
            "train_batch_size": self.global_batch_size,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "zero_optimization": {"stage": self.zero_stage, "overlap_comm": self.overlap},
            "dpt": {"training": {"ep_size": self.ep_size, "activation_checkpointing": self.activation_checkpointing}},
        }
        return fields | ({self.precision: {"enabled": True}} if self.precision != "fp32" else {})


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of exchange in one optimizer step, on each rank."""

    what: str
    kind: Kind
    group: int
    """Number of participating ranks."""
    stride: int
    """Distance between neighbours in the group, in ranks."""
    payload: float
    """Bytes of the reduced tensor, the gathered result, or the rows sent (a rank's own included)."""
    calls: int


def traffic(config: ModelConfig, layout: Layout, height: int = 0, width: int = 0) -> list[Traffic]:
    """Each rank's exchanges in an optimizer step, with evenly loaded experts; latents as in `costs.macs`.

    As in DeepSpeed: ZeRO 1 reduces gradients once per step, ZeRO 2 and 3 once per micro-batch; ZeRO 1 and 2 by all-reduce.
    Experts' gradients and weights travel between the ranks that hold the same ones. Rows visit their experts' ranks and return,
    and so do their gradients; with activation checkpointing the first trip is repeated.
    """
    size = 4 if layout.precision == "fp32" else 2
    count = costs.num_params(config)
    stage, ranks, ep = layout.zero_stage, layout.ranks, layout.ep_size
    shared = count.total - count.routed - costs.num_tokens(config) * config.hidden_size  # the position table has no gradient
    if ep == 1:  # experts are parameters like any others
        parts = [("weights", shared + count.routed, ranks, 1)]
    else:
        parts = [("weights", shared, ranks, 1), ("experts", count.routed // ep, ranks // ep, ep)]
    found = []
    for name, numel, group, stride in parts:
        times = layout.accumulation if stage >= 2 else 1
        reduction: Kind = "reduce_scatter" if stage == 3 else "all_reduce"
        gathers = (2 + layout.activation_checkpointing) * layout.accumulation if stage == 3 else int(stage >= 1)
        place = {"group": group, "stride": stride}
        found.append(Traffic(what=f"gradients of {name}", kind=reduction, payload=size * numel * times, calls=times, **place))
        found.append(Traffic(what=name, kind="all_gather", payload=size * numel * gathers, calls=gathers, **place))
    rows = layout.micro_batch_size * costs.num_tokens(config, height, width) * config.top_k if config.num_experts else 0
    journeys = (4 + 2 * layout.activation_checkpointing) * config.depth * layout.accumulation
    payload = size * rows * config.hidden_size * journeys
    found.append(Traffic(what="tokens", kind="all_to_all", group=ep, stride=1, payload=payload, calls=journeys))
    return [one for one in found if one.group > 1 and one.payload]


def seconds(one: Traffic, cluster: Cluster) -> float:
    """Time of an exchange when all groups of its kind run theirs at once."""
    n = one.group
    steps = math.ceil(math.log2(n)) * (2 if one.kind == "all_reduce" else 1)
    waiting = one.calls * steps * cluster.latency_s
    together = max(1, min(n, cluster.gpus_per_node // one.stride))  # members on one node
    if one.kind == "all_to_all":
        inside = one.payload * (together - 1) / n / cluster.node_bandwidth
        outside = one.payload * (n - together) / n / cluster.network_bandwidth
        return max(inside, outside) + waiting
    moved = one.payload * (n - 1) / n * (2 if one.kind == "all_reduce" else 1)
    # Rings that leave a node do so through the network card of each member on it.
    bandwidth = cluster.node_bandwidth
    if n > together:
        bandwidth = min(bandwidth, together * cluster.network_bandwidth) if together > 1 else cluster.network_bandwidth
    return moved / bandwidth + waiting


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A projected step and run, in seconds, bytes and per second."""

    layout: Layout
    compute_s: float
    straggling_s: float
    """Waiting for the slowest rank, and for the rank with the fullest experts."""
    tokens_s: float
    """Moving tokens to experts and back."""
    gradients_s: float
    """The part of gradient reduction not hidden behind the backward pass, and gathering weights after the update."""
    optimizer_s: float
    samples_per_second: float
    mfu: float
    """Share of the peak; recomputation does not count."""
    efficiency: float
    """Share of one GPU's speed without communication."""
    memory_bytes: float
    checkpoint_bytes: float
    """Bytes of a checkpoint, all ranks together."""
    checkpoint_pause_s: float
    """Pause while a rank's share is copied to host memory."""
    checkpoint_write_s: float
    """Time to write a checkpoint, in the background."""
    read_bytes_per_second: float
    """Bytes read from shards, all ranks together."""

    @property
    def step_s(self) -> float:
        return self.compute_s + self.straggling_s + self.tokens_s + self.gradients_s + self.optimizer_s

    def points_per_second(self, log_every: int = 50) -> float:
        """Numbers sent to MLflow per second."""
        return METRICS_PER_RECORD / (log_every * self.step_s)


def project(
    config: ModelConfig,
    layout: Layout,
    cluster: Cluster,
    *,
    imbalance: float = 1.1,
    num_emas: int = 1,
    height: int = 0,
    width: int = 0,
) -> Projection:
    """Project a step of `layout` on `cluster`. `imbalance`: load of the fullest rank over the mean, as runs record it."""
    macs = costs.macs(config, height, width)
    per_rank = layout.micro_batch_size * layout.accumulation
    useful = 2.0 * macs.training * per_rank
    done = useful + (2.0 * macs.forward * per_rank if layout.activation_checkpointing else 0.0)
    compute = done / (cluster.peak_flops * cluster.efficiency)
    slowest = compute * cluster.jitter * math.sqrt(2.0 * math.log(layout.ranks)) if layout.ranks > 1 else 0.0
    if layout.ep_size > 1:
        slowest += compute * _expert_share(config, height, width) * (imbalance - 1.0)
    times = {one.what: seconds(one, cluster) for one in traffic(config, layout, height, width)}
    reduction = sum(t for what, t in times.items() if what.startswith("gradients"))
    backward = compute * 2.0 / 3.0 / (layout.accumulation if layout.zero_stage == 1 else 1)  # of the micro-batch that reduces
    hidden = min(reduction, backward) if layout.overlap else 0.0
    gathered = sum(t for what, t in times.items() if what in ("weights", "experts"))
    if layout.zero_stage == 3 and layout.overlap:  # fetched ahead while the blocks before compute
        gathered = max(0.0, gathered - compute / 3.0)
    count = costs.num_params(config).total
    optimizer = (24 + 12 * num_emas) * count / layout.ranks / cluster.memory_bandwidth
    plan = memory(
        config, ranks=layout.ranks, ep_size=layout.ep_size, zero_stage=layout.zero_stage, precision=layout.precision,
        micro_batch_size=layout.micro_batch_size, activation_checkpointing=layout.activation_checkpointing,
        num_emas=num_emas, height=height, width=width,
    )  # fmt: skip
    parts = {
        "compute_s": compute, "straggling_s": slowest, "tokens_s": times.get("tokens", 0.0),
        "gradients_s": reduction - hidden + gathered, "optimizer_s": optimizer,
    }  # fmt: skip
    step = sum(parts.values())
    rate = layout.global_batch_size / step
    saved = (STATE_BYTES + 4 * (num_emas - 1)) * count
    alone = cluster.peak_flops * cluster.efficiency / (2.0 * macs.training)  # samples per second
    return Projection(
        layout=layout,
        **parts,
        samples_per_second=rate,
        mfu=rate * 2.0 * macs.training / (cluster.peak_flops * layout.ranks),
        efficiency=rate / (alone * layout.ranks),
        memory_bytes=plan.total,
        checkpoint_bytes=saved,
        checkpoint_pause_s=saved / layout.ranks / cluster.host_bandwidth,
        checkpoint_write_s=saved / cluster.storage_bandwidth,
        read_bytes_per_second=rate * sample_bytes(config, height, width),
    )


def _expert_share(config: ModelConfig, height: int, width: int) -> float:
    """Routed experts' share of the multiply-accumulates."""
    matrices = 3 if config.expert_activation == "swiglu" else 2
    tokens = costs.num_tokens(config, height, width)
    routed = config.depth * tokens * config.top_k * matrices * config.hidden_size * config.mlp_width
    return routed / costs.macs(config, height, width).forward


def sample_bytes(config: ModelConfig, height: int = 0, width: int = 0) -> int:
    """Bytes of one sample in a shard: float16 moments of the image, its mirror image and its label, in tar's blocks of 512.

    Class-conditional pre-training; perception has moments of its conditions and targets instead.
    """
    height, width = height or config.input_size, width or config.input_size
    moments = 2 * 2 * config.in_channels * height * width + 128  # numpy's header
    return sum(512 + math.ceil(length / 512) * 512 for length in (moments, moments, 136, 512))


def best_layout(
    config: ModelConfig,
    ranks: int,
    global_batch_size: int,
    cluster: Cluster,
    *,
    ep_size: int = 0,
    zero_stage: int = 0,
    headroom: float = 0.85,
    height: int = 0,
    width: int = 0,
) -> Projection:
    """The fastest layout that fits `headroom` of each GPU's memory; UserError if none does.

    `ep_size`, `zero_stage`: only layouts with these; 0: any.
    """
    fitting = []
    for layout in _layouts(config, ranks, global_batch_size):
        if layout.ep_size != (ep_size or layout.ep_size) or layout.zero_stage != (zero_stage or layout.zero_stage):
            continue
        one = project(config, layout, cluster, height=height, width=width)
        if one.memory_bytes <= headroom * cluster.memory_bytes:
            fitting.append(one)
    if not fitting:
        raise UserError(
            f"{ranks} GPUs of {cluster.memory_bytes / 1e9:.0f} GB cannot train this network with a global batch of "
            f"{global_batch_size}; take more GPUs, or a batch that they divide."
        )
    return min(fitting, key=lambda p: (p.step_s, p.memory_bytes))


def _layouts(config: ModelConfig, ranks: int, global_batch_size: int) -> Iterator[Layout]:
    if global_batch_size % ranks:
        return
    share = global_batch_size // ranks
    degrees = [e for e in range(1, (config.num_experts or 1) + 1) if (config.num_experts or 1) % e == 0 and ranks % e == 0]
    micro_batches = [m for m in range(1, share + 1) if share % m == 0]
    for ep_size, stage, micro, checkpointing in itertools.product(degrees, (1, 2, 3), micro_batches, (False, True)):
        if not (stage == 3 and ep_size > 1):
            yield Layout(
                ranks=ranks, micro_batch_size=micro, accumulation=share // micro, ep_size=ep_size, zero_stage=stage,
                activation_checkpointing=checkpointing,
            )  # fmt: skip
