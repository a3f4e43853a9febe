"""One Mixture-of-Experts layer, forward and backward: ours, experts by boolean masks, DeepSpeed's own without dropping; evenly
loaded, and with one hot expert.

python -m benchmarks.moe_layer [--tokens 8192] [--hidden-size 384] [--experts 8] [--precisions fp32 bf16] [--json FILE]

GELU experts of width 4 D, top-2, renormalised weights. `bound` is the time of the experts' own matrix products, evenly loaded.
`hot`: every token's first choice is expert 0.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import harness, memory, textbook
from dpt import distributed
from dpt.config.sections import ModelConfig
from dpt.models.moe import MoE

TOP_K = 2


def tokens(count: int, config: ModelConfig, *, hot: bool, dtype: torch.dtype) -> Tensor:
    """Random tokens [1, count, D] whose first E channels say which two experts the router of `routed` chooses."""
    experts = config.num_experts
    x = torch.randn(1, count, config.hidden_size, device=harness.device())
    positions = torch.arange(count, device=x.device)
    first = torch.zeros_like(positions) if hot else positions % experts
    second = 1 + positions % (experts - 1) if hot else (positions + 1 + positions // experts % (experts - 1)) % experts
    x[0, :, :experts] = 0.0
    x[0, positions, first], x[0, positions, second] = 2.0, 1.0
    return x.to(dtype)


@torch.no_grad()
def routed(layer: nn.Module, gate: Tensor, config: ModelConfig) -> nn.Module:
    """The layer with router weights `gate` [E, D] that read the first E channels."""
    gate.copy_(5.0 * torch.eye(config.num_experts, config.hidden_size))
    return layer


def ours(config: ModelConfig) -> nn.Module:
    layer = MoE(config)
    layer.reset_experts()
    return routed(layer, layer.gate.weight, config)


def masks(config: ModelConfig) -> nn.Module:
    layer = textbook.MoE(config)
    return routed(layer, layer.gate.weight, config)


def deepspeed_layer(config: ModelConfig) -> nn.Module:
    """`deepspeed.moe.layer.MoE` without dropping and without noise, on one rank."""
    distributed.init()
    from deepspeed.moe.layer import MoE as DeepSpeedMoE

    expert = textbook.Mlp(config.hidden_size, config.mlp_width)
    settings = {"k": TOP_K, "drop_tokens": False, "top2_2nd_expert_sampling": False}
    layer = DeepSpeedMoE(config.hidden_size, expert, config.num_experts, **settings)
    layer.set_deepspeed_parallelism()
    return routed(layer, layer.deepspeed_moe.gate.wg.weight, config)


def forward_backward(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Both passes, with gradients of the weights and of the tokens."""
    x = x.clone().requires_grad_()
    seed = torch.randn_like(x)

    def action() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x)[0].backward(seed)

    return action


WAYS: dict[str, Callable[[ModelConfig], nn.Module]] = {harness.OURS: ours, "boolean masks": masks, "deepspeed": deepspeed_layer}


def measure(
    config: ModelConfig, *, count: int, precision: str, rounds: int, ways: Sequence[str] = tuple(WAYS)
) -> list[harness.Row]:
    """Measure these layers under both loads, in turn."""
    dtype, d, width = harness.DTYPES[precision], config.hidden_size, config.mlp_width
    slots = count * TOP_K // config.num_experts
    layers = [(slots, d, width), (slots, width, d)] * config.num_experts
    bound = harness.MatrixProducts([p for layer in layers for p in harness.linear_products(*layer)], dtype)
    builders = {name: WAYS[name] for name in ways}
    actions: dict[str, Callable[[], object]] = {harness.BOUND: bound}
    peaks: dict[str, float] = {}
    for hot in (False, True):
        x = tokens(count, config, hot=hot, dtype=dtype)
        for name, build in builders.items():
            actions[_label(name, hot)] = forward_backward(build(config).to(x.device, dtype), x)
            peaks[_label(name, hot)] = memory.peak_bytes(partial(forward_backward, build(config).to(x.device, dtype), x))
    timings = harness.interleave(actions, rounds)
    results = []
    for hot in (False, True):
        names = {name: _label(name, hot) for name in builders}
        case = f"{precision} {'hot' if hot else 'balanced'}"
        chosen = {harness.BOUND: timings[harness.BOUND], **{name: timings[label] for name, label in names.items()}}
        results += harness.rows(case, chosen, peak_bytes={name: peaks[label] for name, label in names.items()})
    for row in results:
        if "hot" in row["case"] and row["what"] in builders:
            uneven, even = (timings[_label(row["what"], hot)].wall for hot in (True, False))
            row["hot_over_balanced"] = harness.ratio(uneven, even)
    return results


def _label(name: str, hot: bool) -> str:
    return f"{name} hot" if hot else name


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, rounds=9, tokens=8192, hidden_size=384, experts=8)
    parser.add_argument("--precisions", nargs="+", default=list(harness.DTYPES), choices=list(harness.DTYPES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="what to compare (default: all that do not take minutes)")
    arguments = parser.parse_args(argv)
    config = ModelConfig(
        hidden_size=arguments.hidden_size, num_heads=1, num_experts=arguments.experts, top_k=TOP_K, expert_activation="gelu",
        shared_expert_width=0, normalize_top_k=True,
    )  # fmt: skip
    results: list[harness.Row] = []
    notes: list[str] = []
    for precision in arguments.precisions:
        notes += filter(None, [harness.crawls(precision)])
        ways = harness.ways_to_measure(precision, arguments.ways, tuple(WAYS), (harness.OURS,))
        results += measure(config, count=arguments.tokens, precision=precision, rounds=arguments.rounds, ways=ways)
    harness.finish("moe_layer", results, arguments, notes=notes)


if __name__ == "__main__":
    main()
