"""A Mixture-of-Experts layer in three parts: router, dispatch, experts.

Shape legend: T tokens, D hidden_size, E experts, K top-k, N routed slots. Token-choice top-k routing (Shazeer et al.,
"Outrageously Large Neural Networks", 2017), dropless unless a capacity is set; the losses' sources are at their functions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dpt.config.sections import ModelConfig
from dpt.models.experts import Dispatch, Experts
from dpt.models.layers import SwiGLU

BIAS_STEP = 1e-3
"""Step of the loss-free routing bias (Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024, section 3: u = 0.001)."""

_LEAST_GATE = 1e-20
"""Least sum of gates used as a divisor: sigmoids may all be 0."""


class RouterStats(NamedTuple):
    """One layer's router statistics over this rank's tokens."""

    mean_probs: Tensor
    """Mean router probability of each expert, float32 [E], with gradient."""
    z_loss: Tensor
    """Mean squared log-partition of the router's logits, float32 [], with gradient (Zoph et al., "ST-MoE", 2022, eq. 5); 0
    for sigmoids, which have no partition."""
    entropy: Tensor
    """Mean entropy of a token's router probabilities, in nats, float32 []."""
    counts: Tensor
    """Slots routed to each expert, int64 [E], dropped ones included."""
    dropped: Tensor
    """Slots dropped for lack of capacity, int64 []."""


class Routing(NamedTuple):
    """A router's decision on T tokens."""

    weights_TK: Tensor
    """Weight of each chosen expert, float32, with gradient."""
    experts_TK: Tensor
    """Chosen experts, int64, best first."""
    probs_TE: Tensor
    """Softmax of the logits, or their sigmoids divided by the sigmoids' sum; float32."""
    z_loss: Tensor
    """See RouterStats."""
    entropy: Tensor
    """See RouterStats."""


class Router(nn.Module):
    """Router in float32: tokens [T, D] -> Routing.

    Gates are a softmax over the experts or, by `router_gate`, each expert's own sigmoid (DeepSeek-AI, "DeepSeek-V3", 2024,
    section 2.1.2): then one expert's score does not fall when another's rises.
    """

    bias_steps: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.normalize = config.normalize_top_k
        self.sigmoid = config.router_gate == "sigmoid"
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        steps = torch.zeros(config.num_experts, dtype=torch.int64)
        # Whole steps, so that casting a model to bf16 cannot round the bias.
        self.register_buffer("bias_steps", steps if config.router_bias_balancing else None)

    def reset_parameters(self) -> None:
        """Uniform in +-1 / sqrt(D), like DiT-MoE's gate."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x_TD: Tensor) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            gates_TE = logits_TE.sigmoid() if self.sigmoid else logits_TE.softmax(dim=-1)
            # The bias decides who is chosen, never the weight that an expert gets.
            scores_TE = gates_TE if self.bias_steps is None else gates_TE + BIAS_STEP * self.bias_steps
            experts_TK = scores_TE.topk(self.top_k, dim=-1).indices
            weights_TK = gates_TE.gather(1, experts_TK)
            if self.normalize:
                weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=_LEAST_GATE)
            if self.sigmoid:
                probs_TE = gates_TE / gates_TE.sum(dim=-1, keepdim=True).clamp(min=_LEAST_GATE)
                entropy = torch.special.entr(probs_TE.detach()).sum() / len(x_TD)
                return Routing(weights_TK, experts_TK, probs_TE, logits_TE.new_zeros(()), entropy)
            probs_TE = gates_TE
            log_partition_T = logits_TE.logsumexp(dim=-1)
            # -sum p log p = log-partition - sum p logit: one dot product.
            mean_logit = probs_TE.detach().flatten().dot(logits_TE.detach().flatten()) / len(x_TD)
            entropy = log_partition_T.detach().mean() - mean_logit
            return Routing(weights_TK, experts_TK, probs_TE, log_partition_T.square().mean(), entropy)


def within_capacity(routing: Routing, num_samples: int, num_experts: int, factor: float) -> Tensor:
    """The slots that their expert has room for, bool [T, K].

    An expert takes at most ceil(factor T' K / E) of one sample's T' tokens, the heaviest ones. The limit is per sample,
    so a sample's result depends on nothing else in its batch.
    """
    weights_TK, experts_TK = routing.weights_TK.detach(), routing.experts_TK
    tokens, k = experts_TK.shape
    tokens_per_sample = tokens // num_samples
    capacity = math.ceil(factor * tokens_per_sample * k / num_experts)
    samples = torch.arange(tokens, device=experts_TK.device) // tokens_per_sample
    groups = (samples[:, None] * num_experts + experts_TK).flatten()
    order = weights_TK.flatten().argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]  # by group, then by decreasing weight
    sizes = torch.zeros(num_samples * num_experts, dtype=torch.int64, device=groups.device)
    sizes.index_add_(0, groups, torch.ones_like(groups))
    starts = sizes.cumsum(0) - sizes
    ranks = torch.arange(order.shape[0], device=order.device) - starts[groups[order]]
    return torch.empty_like(groups, dtype=torch.bool).index_copy_(0, order, ranks < capacity).view(tokens, k)


class MoE(nn.Module):
    """Routed experts, and a shared one beside them if asked for: x [B, T, D] -> ([B, T, D], RouterStats).

    train() and eval() compute the same function. `observer`, if set, sees every routing.
    """

    def __init__(self, config: ModelConfig, num_local_experts: int | None = None) -> None:
        nn.Module.__init__(self)  # not super(): the expert-parallel subclass also derives from DeepSpeed's MoE
        self.num_experts = config.num_experts
        self.observer: Callable[[Routing], None] | None = None
        self.capacity_factor = config.capacity_factor
        self.gate = Router(config)
        num_local_experts = num_local_experts or config.num_experts
        self.experts = Experts(num_local_experts, config.hidden_size, config.mlp_width, config.expert_activation)
        # Not named "shared_expert": DeepSpeed takes every key of a MoE that holds "expert" for a routed one.
        self.shared = SwiGLU(config.hidden_size, config.shared_expert_width) if config.shared_expert_width else None

    def reset_experts(self) -> None:
        """Initialise the experts held here."""
        self.experts.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.gate(x_TD)
        if self.observer is not None:  # not a hook, which compiled blocks pass over
            _show(self.observer, routing)
        if self.capacity_factor:
            y_TD, counts_E, dropped = self._route_within_capacity(x_TD, routing, x.shape[0])
        else:
            y_TD, counts_E = self._route(x_TD, routing)
            dropped = counts_E.new_zeros(())
        return y_TD.view_as(x), RouterStats(routing.probs_TE.mean(dim=0), routing.z_loss, routing.entropy, counts_E, dropped)

    def _route(self, x_TD: Tensor, routing: Routing, kept_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Results of the tokens' experts plus the shared one [T, D], and each expert's slots [E]."""
        dispatch = Dispatch(routing.experts_TK, self.num_experts, kept_TK)
        y_ND, shared_TD = self._run_experts(dispatch.permute(x_TD), dispatch.counts, x_TD)
        y_TD = dispatch.combine(y_ND, routing.weights_TK)
        return y_TD if shared_TD is None else y_TD + shared_TD, dispatch.counts

    @torch.compiler.disable
    def _route_within_capacity(self, x_TD: Tensor, routing: Routing, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """`_route` with dropped slots, so that shapes depend on the routing; returns slots routed [E] and dropped [] too."""
        y_TD, counts = self._route(x_TD, routing, within_capacity(routing, num_samples, self.num_experts, self.capacity_factor))
        slots = routing.experts_TK.flatten()
        routed = torch.zeros_like(counts).index_add_(0, slots, torch.ones_like(slots))
        return y_TD, routed, routed.sum() - counts.sum()

    def _run_experts(self, x_ND: Tensor, counts_E: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run slots sorted by expert [N, D] through the experts, and tokens [T, D] through the shared one if there is one.

        Expert parallelism overrides this: the shared expert works while slots travel.
        """
        return self.experts(x_ND, counts_E), None if self.shared is None else self.shared(x_TD)


@torch.compiler.disable
def _show(observer: Callable[[Routing], None], routing: Routing) -> None:
    observer(routing)


class RoutingSummary(NamedTuple):
    """The routers' losses and counts over all layers (see `summarize`)."""

    load_balancing_loss: Tensor
    router_z_loss: Tensor
    tokens_per_expert: Tensor
    router_probs: Tensor
    router_entropy: Tensor
    dropped_share: Tensor


class EarlierRouting(NamedTuple):
    """Sums of what `summarize` returned for a step's earlier micro-batches, all of equal size."""

    tokens_per_expert: Tensor
    router_probs: Tensor

    def plus(self, tokens_per_expert: Tensor, router_probs: Tensor) -> "EarlierRouting":
        """Add one more micro-batch."""
        return EarlierRouting(self.tokens_per_expert + tokens_per_expert, self.router_probs + router_probs)


def summarize(stats: list[RouterStats], earlier: EarlierRouting | None = None) -> RoutingSummary:
    """Turn the layers' router statistics into losses (float32 [], summed over layers), counts int64 [L, E], mean probabilities
    float64 [L, E], mean entropies of a token's probabilities float64 [L] (nats), and dropped share [].

    Balance loss of a layer: E f . P with f the fraction of slots routed to each expert and P the mean router probability
    (Fedus et al., "Switch Transformers", 2021, eq. 4 to 6, without alpha). With gradients enabled in a distributed run, f
    is that of all ranks' tokens; each rank's gradient is that of E f . P_rank, whose mean over ranks (what data parallelism
    takes) is exactly the gradient of the loss of the whole batch, and the values are those of the whole batch. Under
    no_grad nothing is exchanged, so that ranks may evaluate different numbers of batches.

    With gradient accumulation f is that of the step's tokens up to and including this micro-batch (Qiu et al., "Demons in the
    Detail", 2025, section 3; those to come cannot be known), and the value is what this micro-batch adds to the loss: the
    mean over a step's micro-batches is exactly E f . P of the global batch, however it was split.
    """
    probs = torch.stack([s.mean_probs for s in stats])  # [L, E]
    z_loss = torch.stack([s.z_loss for s in stats]).sum()
    entropy = torch.stack([s.entropy for s in stats])  # [L]
    counts = torch.stack([s.counts for s in stats])  # [L, E]
    dropped = torch.stack([s.dropped for s in stats]).sum()
    means = torch.cat([probs.detach().flatten(), entropy, z_loss.detach()[None]]).double()
    if torch.is_grad_enabled() and dist.is_initialized() and dist.get_world_size() > 1:
        shared = torch.cat([means / dist.get_world_size(), counts.flatten().double(), dropped[None].double()])
        dist.all_reduce(shared)  # one exchange for all layers; doubles hold the counts exactly
        means = shared[: means.numel()]
        counts = shared[means.numel() : -1].round().long().view_as(counts)
        dropped = shared[-1].round().long()
    means_LE, entropy, z_value = means[: probs.numel()].view_as(probs), means[probs.numel() : -1], means[-1]
    if earlier is None:
        fractions, value = _balance(counts, means_LE)
    else:
        _, before = _balance(*earlier)
        fractions, after = _balance(counts + earlier.tokens_per_expert, means_LE + earlier.router_probs)
        value = after - before
    local = counts.shape[1] * (fractions.float() * probs).sum()
    return RoutingSummary(
        load_balancing_loss=local + (value.float() - local).detach(),
        router_z_loss=z_loss + (z_value.float() - z_loss).detach(),
        tokens_per_expert=counts,
        router_probs=means_LE,
        router_entropy=entropy,
        dropped_share=dropped / counts.sum(),
    )


def _balance(counts_LE: Tensor, probs_LE: Tensor) -> tuple[Tensor, Tensor]:
    """Fractions of slots, float64 [L, E], and the balance loss [] times the number of micro-batches summed in `probs_LE`."""
    fractions = counts_LE.double() / counts_LE.sum(dim=1, keepdim=True)
    return fractions, counts_LE.shape[1] * (fractions * probs_LE).sum()
