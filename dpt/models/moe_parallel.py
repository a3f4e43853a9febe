"""Expert parallelism: the ranks of a group share a layer's experts, and tokens travel to them and back.

The layer is a `deepspeed.moe.layer.MoE`, so DeepSpeed makes its process groups, averages its experts' gradients over the ranks
that hold the same ones, and checkpoints each expert by its global id. Only this file of the models imports DeepSpeed.
"""

import re
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models import activations, grouped_mlp
from dpt.models.moe import MoE

_DEEPSPEED_EXPERTS = "deepspeed_moe.experts.deepspeed_experts."


class _Exchange:
    """One all-to-all of rows between the ranks of a group and, in the backward pass, of their gradients."""

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup) -> None:
        """`send[r]` rows go to rank r of the group, in order; `receive[r]` come from it."""
        self.send, self.receive, self.group = send, receive, group
        self._out: Tensor | None = None
        self._sent: Tensor | None = None
        self._work: dist.Work | None = None

    def start(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Start sending rows; return where they will lie once `wait` has returned. `back`: gradients, the other way."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        self._sent = x.contiguous()
        self._out = x.new_empty(sum(receive), x.shape[1])
        self._work = dist.all_to_all_single(self._out, self._sent, receive, send, group=self.group, async_op=True)
        return self._out

    def wait(self) -> Tensor:
        """Return the rows received."""
        assert self._work is not None
        assert self._out is not None
        self._work.wait()
        out, self._out, self._sent, self._work = self._out, None, None, None
        return out


class _Send(torch.autograd.Function):
    """Starts an exchange of rows [N, D] -> [M, D], which are not valid until `_Experts` has waited for them.

    Its backward waits for the gradients that `_Experts` sent back; the gradient passed to it is meaningless.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.wait(), None


class _Experts(torch.autograd.Function):
    """The experts on rows that `_Send` sent them: [M, D] -> [M, D], both ordered by the rank they come from.

    Backward sends the rows' gradients away before it computes the weights', which then overlap.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None,
                counts_RE: Tensor, kind: activations.Kind, exchange: _Exchange) -> Tensor:  # fmt: skip
        exchange.wait()
        order, inverse = _expert_major(counts_RE, x.shape[0])
        counts, x_sorted = counts_RE.sum(dim=0), x.index_select(0, order)
        hidden, out = grouped_mlp.forward_pass(x_sorted, grouped_mlp.ExpertWeights(w_in, b_in, w_out, b_out), counts, kind)
        ctx.save_for_backward(x_sorted, hidden, w_in, w_out, counts, order, inverse)
        ctx.kind, ctx.biased, ctx.exchange = kind, b_in is not None, exchange
        return out.index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, w_in, w_out, counts, order, inverse = ctx.saved_tensors

        def send_back(d_x: Tensor) -> None:
            ctx.exchange.start(d_x.index_select(0, inverse), back=True)

        rows = grad.index_select(0, order)
        weights = grouped_mlp.backward_pass(rows, x, hidden, w_in, w_out, counts, ctx.kind, ctx.biased, send_back)
        return grad, *weights, None, None, None


class _Return(torch.autograd.Function):
    """Sends rows [M, D] back to the ranks that they came from: [N, D]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start(y, back=True)
        return exchange.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.start(grad)
        return ctx.exchange.wait(), None


def _expert_major(counts_RE: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The order, int64 [N], that sorts rows received by (rank, expert) into (expert, rank), and its inverse."""
    ranks, experts = counts_RE.shape
    row_experts = torch.arange(experts, device=counts_RE.device).repeat(ranks)
    order = row_experts.repeat_interleave(counts_RE.flatten(), output_size=num_rows).argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(num_rows, device=order.device))
    return order, inverse


class ParallelMoE(MoE, DeepSpeedMoE):
    """The MoE layer with num_experts / ep_size experts on each rank of an expert-parallel group.

    Same routing, results and initial weights as MoE on one device. In its state dict the experts have DeepSpeed's names
    (`deepspeed_moe.experts.deepspeed_experts.<local id>.<parameter>`), one key per expert.
    """

    use_residual = False
    enable_expert_tensor_parallelism = False

    def __init__(self, config: ModelConfig, ep_size: int) -> None:
        """`ep_size`: at least 2. UserError if it does not divide the experts, or torch.distributed is not initialised."""
        if not dist.is_initialized():
            raise UserError(
                f"dpt.training.ep_size {ep_size} needs that many processes; start them with the deepspeed launcher."
            )
        if config.num_experts % ep_size:
            raise UserError(
                f"dpt.training.ep_size {ep_size} does not divide dpt.model.num_experts {config.num_experts}; choose a divisor."
            )
        self.num_local_experts = config.num_experts // ep_size
        MoE.__init__(self, config, self.num_local_experts)  # not DeepSpeed's, which would build its own experts
        self.ep_size = ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.ep_group: dist.ProcessGroup | None = None
        for parameter in self.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]
        self.register_state_dict_post_hook(_split_experts)
        self.register_load_state_dict_pre_hook(_join_experts)

    @property
    def deepspeed_moe(self) -> "ParallelMoE":
        """The object that DeepSpeed sets the expert-parallel group on."""
        return self

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:
        self.ep_group = group

    @property
    def first_expert(self) -> int:
        """Global id of the first expert here: neighbouring ranks share a group, as DeepSpeed numbers them."""
        rank = dist.get_rank(self.ep_group) if self.ep_group is not None else dist.get_rank() % self.ep_size
        return rank * self.num_local_experts

    def reset_experts(self) -> None:
        self.experts.reset_parameters(self.first_expert)

    @torch.compiler.disable
    def _run_experts(self, x_ND: Tensor, counts_E: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.ep_group is not None, "the expert-parallel group is not set; DeepSpeed's initialize sets it"
        send_RE = counts_E.view(self.ep_size, self.num_local_experts).contiguous()
        receive_RE = torch.empty_like(send_RE)
        dist.all_to_all_single(receive_RE, send_RE, group=self.ep_group)
        send, receive = torch.stack([send_RE.sum(dim=1), receive_RE.sum(dim=1)]).tolist()
        exchange = _Exchange(send, receive, self.ep_group)
        x_ND, weights = self.experts.cast(x_ND)
        x = _Send.apply(x_ND, exchange)
        # Autograd runs later nodes first, so the shared expert lies between the exchange's two ends in the backward pass too.
        shared_TD = None if self.shared is None else self.shared(x_TD)
        y = _Experts.apply(x, *weights, receive_RE, self.experts.kind, exchange)
        return _Return.apply(y, _Exchange(send, receive, self.ep_group)), shared_TD


def _split_experts(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """State-dict hook: stacked experts -> one key per expert, under DeepSpeed's names."""
    experts = f"{prefix}experts."
    for key in [k for k in state if k.startswith(experts)]:
        stacked = state.pop(key)
        for e in range(stacked.shape[0]):
            state[f"{prefix}{_DEEPSPEED_EXPERTS}{e}.{key[len(experts) :]}"] = stacked[e]


def _join_experts(module: nn.Module, state: dict[str, Any], prefix: str, *_args: Any) -> None:
    """State-dict hook: DeepSpeed's names -> stacked experts; a stack of all experts is cut to those held here."""
    assert isinstance(module, ParallelMoE)
    pattern = re.compile(re.escape(prefix + _DEEPSPEED_EXPERTS) + r"(\d+)\.(.+)")
    found: dict[str, dict[int, Tensor]] = {}
    for key in list(state):
        match = pattern.fullmatch(key)
        if match:
            found.setdefault(match[2], {})[int(match[1])] = state.pop(key)
        elif key.startswith(f"{prefix}experts.") and state[key].shape[0] == module.num_experts:
            state[key] = state[key].narrow(0, module.first_expert, module.num_local_experts)
    for name, parts in found.items():
        state[f"{prefix}experts.{name}"] = torch.stack([parts[e] for e in sorted(parts)])
