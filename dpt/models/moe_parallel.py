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
from dpt.models.moe import MoE

_DEEPSPEED_EXPERTS = "deepspeed_moe.experts.deepspeed_experts."


def _exchange(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows [sum(send), D], send[r] of them to rank r of the group in order -> rows [sum(receive), D] in order of rank."""
    out = x.new_empty(sum(receive), x.shape[1])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


class _AllToAll(torch.autograd.Function):
    """`_exchange`, whose backward sends the gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = (receive, send, group)
        return _exchange(x, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, *ctx.back), None, None, None


class _Reorder(torch.autograd.Function):
    """x[order], whose backward is grad[inverse]: a gather both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def _expert_major(counts_RE: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Order int64 [N] that sorts rows received by (rank, expert) into (expert, rank), and its inverse."""
    ranks, experts = counts_RE.shape
    row_experts = torch.arange(experts, device=counts_RE.device).repeat(ranks)
    order = row_experts.repeat_interleave(counts_RE.flatten(), output_size=num_rows).argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(num_rows, device=order.device))
    return order, inverse


class ParallelMoE(MoE, DeepSpeedMoE):
    """The MoE layer with num_experts / ep_size experts on each rank of an expert-parallel group.

    Same routing, results and initial weights as MoE on one device. In its state dict the experts have DeepSpeed's names
    (`deepspeed_moe.experts.deepspeed_experts.<local id>.<parameter>`), one key an expert.
    """

    use_residual = False
    enable_expert_tensor_parallelism = False

    def __init__(self, config: ModelConfig, ep_size: int) -> None:
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
        """What DeepSpeed hands the expert-parallel group to."""
        return self

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:
        self.ep_group = group

    @property
    def first_expert(self) -> int:
        """Global id of the first expert here: ranks next to each other share a group, as DeepSpeed numbers them."""
        rank = dist.get_rank(self.ep_group) if self.ep_group is not None else dist.get_rank() % self.ep_size
        return rank * self.num_local_experts

    def reset_experts(self) -> None:
        self.experts.reset_parameters(self.first_expert)

    def _run_experts(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        assert self.ep_group is not None, "the expert-parallel group is not set; DeepSpeed's initialize sets it"
        send_RE = counts_E.view(self.ep_size, self.num_local_experts).contiguous()
        receive_RE = torch.empty_like(send_RE)
        dist.all_to_all_single(receive_RE, send_RE, group=self.ep_group)
        send, receive = torch.stack([send_RE.sum(dim=1), receive_RE.sum(dim=1)]).tolist()
        x = _AllToAll.apply(x_ND, send, receive, self.ep_group)
        order, inverse = _expert_major(receive_RE, sum(receive))
        y = _Reorder.apply(self.experts(_Reorder.apply(x, order, inverse), receive_RE.sum(dim=0)), inverse, order)
        return _AllToAll.apply(y, receive, send, self.ep_group)


def _split_experts(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """State-dict hook: stacked experts -> one key an expert, under DeepSpeed's names."""
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


def build_parallel_moe(config: ModelConfig, ep_size: int) -> ParallelMoE:
    """The layer for `ep_size` ranks (at least 2); torch.distributed must be initialised."""
    if not dist.is_initialized():
        raise UserError(f"dpt.training.ep_size {ep_size} needs that many processes; start them with the deepspeed launcher.")
    return ParallelMoE(config, ep_size)
