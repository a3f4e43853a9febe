"""A training step on 1, 2 and 4 ranks: time and exchanges, compared with the analytical model (`dpt.scaling.cluster`).

python -m benchmarks.scaling [--ranks 1 2 4] [--batch 4] [--depth 4] [--hidden-size 128] [--json FILE]

Every rank has one thread and `--batch` samples (weak scaling); on a CPU ranks talk over gloo. `bound` is the same step on
the same ranks at the same time without any exchange. `predicted` adds to it the time that the model predicts for the step's
traffic, at this machine's own rates, measured on the same ranks in the same run. Traffic is counted at torch.distributed's
operators.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness

import torch  # isort: skip
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.train_step import Step, model_config, ours, random_batch
from dpt import distributed
from dpt.config.recipe import DptConfig
from dpt.config.sections import ModelConfig
from dpt.models.dit import DiT
from dpt.scaling.cluster import Cluster, Layout, seconds, traffic
from dpt.scaling.processes import start_forked, start_fresh
from dpt.training.optimizer import DEFAULTS, AdamWEMA

SMALL_MESSAGE = 1 << 14
"""Bytes below which an exchange is statistics or counts, which the analytical model leaves out."""


KINDS = {"allreduce": "all_reduce", "allgather": "all_gather", "reduce_scatter": "reduce_scatter", "alltoall": "all_to_all"}
"""Kinds of exchange by a word in the operator's name."""


class Exchanges(TorchDispatchMode):
    """Bytes that torch.distributed's operators move, by kind; small messages left out."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            kind = next((k for word, k in KINDS.items() if word in name), "")
            # The operators take their results' tensors first and what is sent second.
            place = 1 if kind in ("all_to_all", "reduce_scatter") else 0
            size = sum(t.numel() * t.element_size() for t in tree_leaves(args[place]) if isinstance(t, Tensor)) if kind else 0
            if size > SMALL_MESSAGE and _group_size(args) > 1:
                self.payload[kind] = self.payload.get(kind, 0.0) + size
        return func(*args, **(kwargs or {}))


def _group_size(args: Sequence[Any]) -> int:
    """Number of participating ranks; DeepSpeed also calls groups of one."""
    return next(torch.distributed.ProcessGroup.unbox(a).size() for a in args if isinstance(a, torch.ScriptObject))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration to run on some ranks."""

    name: str
    fields: dict[str, Any]
    ep: bool
    """Whether all ranks share the experts."""
    zero_stage: int


_MOE = {"num_experts": 4, "top_k": 2, "expert_activation": "swiglu"}
CASES = (
    Case(name="dense ZeRO 1", fields={}, ep=False, zero_stage=1),
    Case(name="MoE ZeRO 1", fields=_MOE, ep=False, zero_stage=1),
    Case(name="MoE EP ZeRO 2", fields=_MOE, ep=True, zero_stage=2),
)


# --- on each rank -------------------------------------------------------------------------------------------------------


def alone(config: ModelConfig, batch: int, ranks: int) -> Callable[[], None]:
    """The step without exchanges: the whole network, and an update of this rank's share of its parameters."""
    network = DiT(config)
    inputs = random_batch(DptConfig(model=config), batch)
    latents = inputs["latents"][:, 0].float()
    flat = nn.Parameter(torch.zeros(sum(p.numel() for p in network.parameters()) // ranks))
    flat.grad = torch.zeros_like(flat)
    optimizer = AdamWEMA([flat], DEFAULTS, ema_decays=[0.9999])

    def step() -> None:
        with torch.enable_grad():
            output = network(latents, torch.zeros(batch, dtype=torch.int64), inputs["label"])
        output.prediction.square().mean().backward()
        network.zero_grad()
        optimizer.step()

    return step


def machine_rates(rounds: int, size: int = 1 << 22) -> Cluster:
    """This machine as a cluster of one node, from exchanges of `size` bytes and of nothing."""
    ranks = distributed.world_size()
    large, small = torch.ones(size // 4), torch.ones(1)
    actions = {name: (lambda t=t: torch.distributed.all_reduce(t)) for name, t in (("large", large), ("small", small))}
    timings = harness.interleave(actions, max(rounds, 3), before=distributed.barrier)
    slow, fast = (sorted(timings[name].wall)[len(timings[name].wall) // 2] for name in ("large", "small"))
    hops = 2 * max(1, (ranks - 1).bit_length())
    moved = 2 * size * (ranks - 1) / ranks
    return Cluster(gpus_per_node=ranks, node_bandwidth=moved / max(slow - fast, 1e-9), latency_s=fast / hops)


def worker(arguments: argparse.Namespace) -> None:
    """One rank: measure every case; rank 0 writes the rows."""
    torch.set_num_threads(1)
    distributed.init()
    torch.manual_seed(0)
    ranks = distributed.world_size()
    rates = machine_rates(arguments.rounds) if ranks > 1 else None
    results: list[harness.Row] = []
    for case in CASES:
        shape = {"depth": arguments.depth, "hidden_size": arguments.hidden_size, "num_heads": 4, "num_classes": 10}
        config = model_config("S/2", input_size=arguments.input_size, **shape, **case.fields)
        ep_size = ranks if case.ep else 1
        if case.ep and (ranks == 1 or config.num_experts % ranks):
            continue
        actions: dict[str, Step] = {
            harness.BOUND: alone(config, arguments.batch, ranks),
            harness.OURS: ours(config, arguments.batch, "fp32", zero_stage=case.zero_stage, ep_size=ep_size),
        }
        timings = harness.interleave(actions, arguments.rounds, before=distributed.barrier)
        with Exchanges() as found:
            actions[harness.OURS]()
        rows = harness.rows(f"{case.name}, {ranks} ranks", timings)
        rows[1]["samples_per_s"] = arguments.batch * ranks / rows[1]["median_s"]
        layout = Layout(
            ranks=ranks, micro_batch_size=arguments.batch, ep_size=ep_size, zero_stage=case.zero_stage, precision="fp32",
            overlap=False,
        )  # fmt: skip
        payload = distributed.all_reduce_mean(found.payload)  # ranks differ in the rows that they send back
        rows[1] |= _beside_paper(config, layout, payload, rates, rows[0]["median_s"])
        results += rows
    if distributed.is_main():
        Path(arguments.worker).write_text(json.dumps(results))
    distributed.shutdown()


def _beside_paper(
    config: ModelConfig, layout: Layout, payload: dict[str, float], rates: Cluster | None, compute: float
) -> dict[str, float]:
    """Measured traffic and time over those that the model predicts."""
    expected: dict[str, float] = {}
    exchanges = traffic(config, layout)
    for one in exchanges:
        expected[one.kind] = expected.get(one.kind, 0.0) + one.payload
    figures = {"exchanged_mb": sum(payload.values()) / 1e6}
    figures |= {f"{kind}_over_model": payload.get(kind, 0.0) / size for kind, size in expected.items()}
    if rates is not None:
        figures["predicted_s"] = compute + sum(seconds(one, rates) for one in exchanges)
    return figures


# --- the launches -------------------------------------------------------------------------------------------------------


def launch(ranks: int, arguments: argparse.Namespace, result: Path) -> list[harness.Row]:
    """Run the worker on `ranks` ranks of this machine; without GPUs, as forks of a process that has loaded the libraries."""
    words = [sys.executable, "-m", "benchmarks.scaling", "--worker", str(result)]
    for name in ("rounds", "batch", "depth", "hidden_size", "input_size"):
        words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port())}
    environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    log, start = result.with_suffix(".log"), start_fresh
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"], start = "cpu", start_forked
    started = [start(words, log, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]
    while any(process.exit_code() is None for process in started):
        if any(process.exit_code() for process in started):  # the others would wait for it
            for process in started:
                process.terminate()
        time.sleep(0.02)
    if any(process.exit_code() for process in started):
        raise RuntimeError(f"{ranks} ranks could not be measured:\n{log.read_text(encoding='utf-8')}")
    rows: list[harness.Row] = json.loads(result.read_text())
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, depth=4, hidden_size=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="samples a rank (default: %(default)s)")
    parser.add_argument("--input-size", type=int, default=32, help="side of the latents (default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        return worker(arguments)
    results: list[harness.Row] = []
    with tempfile.TemporaryDirectory(prefix="dpt-scaling-") as temporary:
        for ranks in arguments.ranks:
            results += launch(ranks, arguments, Path(temporary) / f"{ranks}.json")
    _add_efficiency(results)
    return harness.finish("scaling", results, arguments)


def _add_efficiency(results: list[harness.Row]) -> None:
    """Each row's samples per second over those of one rank times the ranks that have a core to themselves."""
    first = {r["case"].split(",")[0]: r["samples_per_s"] for r in results if "samples_per_s" in r and ", 1 ranks" in r["case"]}
    for row in results:
        name, _, ranks = row["case"].partition(", ")
        base = first.get(name) or first.get("MoE ZeRO 1")
        if "samples_per_s" in row and base:
            cores = min(int(ranks.split()[0]), os.cpu_count() or 1)
            row["efficiency"] = row["samples_per_s"] / (base * cores)


if __name__ == "__main__":
    main()
