"""Undocumented DeepSpeed internals that we rely on: each attribute in one function, which names its class.

Written against DeepSpeed 0.19; setup.py bounds the version, and tests/training/test_deepspeed_internals.py fails if another
one differs. Imports run downward only, so two files keep theirs:

- dpt/models/moe_parallel.py passes its layer as a `deepspeed.moe.layer.MoE`. DeepSpeed reads `num_experts`, `ep_size`,
  `num_local_experts`, `expert_group_name`, `use_residual`, `enable_expert_tensor_parallelism` and `deepspeed_moe._set_ep_group`
  of it, `allreduce` and `group_name` of experts' parameters, and experts' keys `deepspeed_moe.experts.deepspeed_experts.ID` in
  the state dict.
- dpt/distributed.py turns off `deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

# --- the engine and its step --------------------------------------------------------------------------------------------


def keep_gradients(engine: Any) -> None:
    """Do not reduce gradients over ranks: `DeepSpeedEngine.enable_backward_allreduce`."""
    engine.enable_backward_allreduce = False


def reduces_gradients(optimizer: Any) -> bool:
    """Whether the optimizer reduces gradients (these methods of the ZeRO optimizers), not the engine in buckets."""
    return hasattr(optimizer, "reduce_gradients") or hasattr(optimizer, "overlapping_partition_gradients_reduce_epilogue")


def drop_step(engine: Any) -> None:
    """End a step without an update: `DeepSpeedEngine.micro_steps` counts what `step` would have counted."""
    engine.zero_grad()
    engine.micro_steps += 1


def overflowed(optimizer: Any) -> bool:
    """Whether the last step was skipped for non-finite gradients: `overflow` of all DeepSpeed's optimizers."""
    return bool(optimizer.overflow)


def grad_norm(optimizer: Any) -> float:
    """Norm of the last step's gradient before clipping: `_global_grad_norm` of all DeepSpeed's optimizers."""
    return float(optimizer._global_grad_norm)


def sum_gradients_directly(optimizer: Any) -> None:
    """Make BF16_Optimizer add each gradient to its float32 sum in one pass; a step's first gradient overwrites the sum.

    It would zero all sums, convert gradients to float32, and add those. Where experts are not spread over ranks, the norm
    is that of its flat sums, instead of one product per parameter. `_update_hp_grad`, `clear_hp_grads`, `get_grads_for_norm`
    and `get_grads_for_reduction` of `BF16_Optimizer` are replaced, its `fp32_groups_gradients`, `fp32_groups_gradients_flat`,
    `fp32_groups_has_gradients` and `has_moe_layers` used.
    """
    if not hasattr(optimizer, "fp32_groups_has_gradients"):
        return
    sums, flags = optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients

    def add(parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total = sums[group][index]
        (total.add_ if flags[group][index] else total.copy_)(parameter.grad.view(total.shape))
        flags[group][index] = True
        if clear_lp_grads:
            parameter.grad.zero_()

    def forget() -> None:
        for group in flags:
            group[:] = [False] * len(group)

    def complete() -> None:
        """Zero the sums of parameters that the step's loss did not depend on."""
        for group, totals in zip(flags, sums, strict=True):
            for has_gradient, total in zip(group, totals, strict=True):
                if not has_gradient:
                    total.zero_()

    def for_norm(for_clipping: bool = False) -> Any:
        complete()
        if optimizer.has_moe_layers:
            return by_parameter(for_clipping=for_clipping)
        flat = optimizer.fp32_groups_gradients_flat
        return flat if for_clipping else (flat, {})

    def for_reduction() -> Any:
        complete()
        return of_ranks()

    by_parameter, of_ranks = optimizer.get_grads_for_norm, optimizer.get_grads_for_reduction
    optimizer._update_hp_grad, optimizer.clear_hp_grads = add, forget
    optimizer.get_grads_for_norm, optimizer.get_grads_for_reduction = for_norm, for_reduction


# --- the loss scaler ----------------------------------------------------------------------------------------------------

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scaler(optimizer: Any) -> Any:
    """`loss_scaler` of the ZeRO optimizers (a `LossScalerBase`, which tells whether it is `dynamic`); None for others."""
    return getattr(optimizer, "loss_scaler", None)


def scaler_state(scaler: Any) -> dict[str, Any]:
    """State of the search for a loss scale: plain attributes of `DynamicLossScaler`. Empty without such a search."""
    return {name: getattr(scaler, name) for name in _SCALER} if scaler is not None and scaler.dynamic else {}


def set_scaler_state(scaler: Any, state: dict[str, Any]) -> None:
    """Restore a `scaler_state`; does nothing without a search."""
    if scaler is not None and scaler.dynamic:
        for name, value in state.items():
            setattr(scaler, name, value)


# --- where master weights lie -------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A rank's part of a parameter: elements offset : offset + numel, whose masters are flat[start : start + numel]."""

    flat: Tensor
    start: int
    offset: int
    numel: int


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Whole shape of a parameter that ZeRO 3 may have emptied: `ds_shape`."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextlib.contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """A context in which parameters that ZeRO stage 3 has partitioned are whole on every rank. Collective."""
    divided = [p for p in parameters if hasattr(p, "ds_id")]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided):
        yield


def flat_groups(optimizer: Any) -> list[tuple[list[nn.Parameter], Tensor]] | None:
    """Groups of parameters in ZeRO 1 and 2, each with this rank's flat part of its masters; None for other stages.

    `DeepSpeedZeroOptimizer.bit16_groups` and `single_partition_of_fp32_groups`; `BF16_Optimizer.bf16_groups` and
    `fp32_groups_flat_partition`.
    """
    for groups, flats in (("bit16_groups", "single_partition_of_fp32_groups"), ("bf16_groups", "fp32_groups_flat_partition")):
        if hasattr(optimizer, flats):
            return list(zip(getattr(optimizer, groups), getattr(optimizer, flats), strict=True))
    return None


def place_in_group(parameter: nn.Parameter, flat: Tensor) -> Place | None:
    """Place of a parameter in its group's flat part (`flat_groups`); None if it lies on other ranks.

    `_hp_mapping`, a `tensor_fragment` with the addresses `lp_fragment_address` in the parameter and `hp_fragment_address` in
    the flat tensor.
    """
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Place(flat=flat, start=high.start, offset=low.start, numel=low.numel)


def place_in_partition(optimizer: Any, parameter: nn.Parameter) -> Place:
    """Place of a parameter in ZeRO 3, which pads its last part: `numel` may be 0 or less.

    `grad_position` by `get_param_id`, `_get_param_partition_rank` and `fp32_partitioned_groups_flat` of
    `DeepSpeedZeroOptimizer_Stage3`; the parameter's `ds_numel`.
    """
    group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    offset = optimizer._get_param_partition_rank(parameter) * size
    numel = min(size, parameter.ds_numel - offset)  # type: ignore[attr-defined]
    return Place(flat=optimizer.fp32_partitioned_groups_flat[group], start=start, offset=offset, numel=numel)


def master_copies(optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter and its float32 copy in ZeRO 0, bf16 or fp16. None in fp32, where parameters are their own masters.

    `fp16_groups` and `fp32_groups` of `FP16_UnfusedOptimizer`.
    """
    if hasattr(optimizer, "fp32_groups"):
        for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(lows, highs, strict=True)


# --- from master weights to those computed with -------------------------------------------------------------------------


def refresh_groups(optimizer: Any) -> None:
    """Refresh ZeRO 1 and 2: `DeepSpeedZeroOptimizer.update_lp_params`, `BF16_Optimizer.update_lp_params`. Collective."""
    optimizer.update_lp_params()


def refresh_partitions(optimizer: Any) -> None:
    """Refresh ZeRO 3. Collective.

    `DeepSpeedZeroOptimizer_Stage3.fp16_partitioned_groups_flat`, `fp32_partitioned_groups_flat`,
    `_unflatten_partitioned_parameters` and `persistent_parameters`: small ones that every rank keeps whole, whose `partition`
    and `all_gather` take a list.
    """
    for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[index].data.copy_(master.data)
        optimizer._unflatten_partitioned_parameters(index)
    if kept_whole := optimizer.persistent_parameters:
        kept_whole[0].partition(kept_whole)
        kept_whole[0].all_gather(kept_whole)
