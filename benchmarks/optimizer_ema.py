"""AdamW with EMA over a network's parameters: ours, compared with a loop over the parameters and with the memory's speed.

python -m benchmarks.optimizer_ema [--preset S/2] [--json FILE]

`partition`: the parameters in one flat tensor, as ZeRO gives them to the optimizer. `bound` is the time in which this machine
moves what an update cannot avoid: it reads weight, gradient, two moments and average, and writes all but the gradient, 36 bytes
per parameter, at the speed of adding one array to another.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks import harness, textbook
from dpt.models.dit import build_model
from dpt.training.optimizer import DEFAULTS, AdamWEMA

BYTES_PER_PARAMETER = 9 * 4


def with_gradients(preset: str, *, flat: bool) -> nn.ParameterList:
    """A network's parameters with random gradients, on the device; `flat`: as one tensor."""
    with torch.device("meta"):
        shapes = [p.shape for p in build_model(preset).parameters()]
    if flat:
        shapes = [torch.Size([sum(s.numel() for s in shapes)])]
    parameters = nn.ParameterList(nn.Parameter(0.02 * torch.randn(s, device=harness.device())) for s in shapes)
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return parameters


def ours(parameters: nn.ParameterList) -> Callable[[], object]:
    return AdamWEMA(parameters.parameters(), DEFAULTS, ema_decays=[0.9999]).step


def loop(parameters: nn.ParameterList) -> Callable[[], None]:
    """torch's plain AdamW, then one average after the other."""
    optimizer = torch.optim.AdamW(parameters.parameters(), lr=1e-4, weight_decay=0.0, foreach=False, fused=False)
    averages = {name: p.detach().clone() for name, p in parameters.named_parameters()}

    def step() -> None:
        optimizer.step()
        textbook.update_ema(averages, parameters)

    return step


def measure(preset: str, rounds: int) -> list[harness.Row]:
    """Measure both ways, on the parameters as they are and flat, in turn."""
    results = []
    for case, flat in (("parameters", False), ("partition", True)):
        first, second = (with_gradients(preset, flat=flat) for _ in range(2))
        numel = sum(p.numel() for p in first)
        stream = harness.Stream(numel)
        actions: dict[str, Callable[[], object]] = {
            harness.BOUND: stream,
            harness.OURS: ours(first),
            "loop over parameters": loop(second),
        }
        timings = harness.interleave(actions, rounds, warmup=2)
        timings[harness.BOUND] = timings[harness.BOUND].scaled(BYTES_PER_PARAMETER * numel / stream.bytes)
        for row in harness.rows(f"{preset} {case}", timings):
            results.append(row | {"gb_per_s": BYTES_PER_PARAMETER * numel / row["median_s"] / 1e9})
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, rounds=15, preset="S/2")
    arguments = parser.parse_args(argv)
    harness.finish("optimizer_ema", measure(arguments.preset, arguments.rounds), arguments)


if __name__ == "__main__":
    main()
