"""DeepSpeed's own keys in a recipe: their names, and their values as far as this package reads them itself."""

from collections.abc import Mapping
from typing import Any

from dpt.config.numbers import NOT_NEGATIVE, POSITIVE, Range
from dpt.errors import UserError

_OBJECTS = frozenset({
    "activation_checkpointing", "aio", "bf16", "checkpoint", "comms_logger", "data_types", "flops_profiler", "fp16",
    "optimizer", "scheduler", "torch_autocast", "zero_optimization",
})  # fmt: skip
_SWITCHES = frozenset({
    "dataloader_drop_last", "disable_allgather", "dump_state", "memory_breakdown", "prescale_gradients", "sparse_gradients",
    "use_data_before_expert_parallelism", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
})  # fmt: skip
_NUMBERS = {"gradient_clipping": NOT_NEGATIVE, "gradient_predivide_factor": POSITIVE}
_COUNTS = frozenset({"gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu"})
"""Checked where the batch is split."""
_OTHERS = frozenset({"communication_data_type", "seq_parallel_communication_data_type", "steps_per_print"})
DEEPSPEED_KEYS = _OBJECTS | _SWITCHES | _COUNTS | _OTHERS | _NUMBERS.keys()
"""Keys allowed in a recipe beside "dpt"."""
_BETA = Range(least=0, below=1)
_OPTIMIZER = {"lr": POSITIVE, "eps": POSITIVE, "weight_decay": NOT_NEGATIVE, "momentum": _BETA}


def check_keys(given: Mapping[str, Any], source: str) -> None:
    """Raise UserError, naming `source` and the key, for values of the wrong kind or out of range."""
    for name, value in given.items():
        if name in _OBJECTS and not isinstance(value, dict):
            raise UserError(f"{source}: {name} is {value!r}; it must be an object of DeepSpeed's fields.")
        if name in _SWITCHES and not isinstance(value, bool):
            raise UserError(f"{source}: {name} is {value!r}; it must be true or false.")
        if name in _NUMBERS:
            _NUMBERS[name].check(f"{source}: {name}", value)
    for name in ("bf16", "fp16"):
        enabled = given.get(name, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            raise UserError(f"{source}: {name}.enabled is {enabled!r}; it must be true or false.")
    _check_optimizer(given.get("optimizer", {}), source)
    _check_zero(given.get("zero_optimization", {}), source)


def _check_optimizer(optimizer: Mapping[str, Any], source: str) -> None:
    params = optimizer.get("params", {})
    if not isinstance(params, dict):
        raise UserError(f"{source}: optimizer.params is {params!r}; it must be an object of the optimizer's options.")
    for name, value in params.items():
        if name in _OPTIMIZER:
            _OPTIMIZER[name].check(f"{source}: optimizer.params.{name}", value)
    betas = params.get("betas", (0.9, 0.999))
    if not isinstance(betas, list | tuple) or len(betas) != 2 or not all(beta in _BETA for beta in betas):
        raise UserError(f"{source}: optimizer.params.betas is {betas!r}; it must be two numbers, each {_BETA}.")


def _check_zero(zero: Mapping[str, Any], source: str) -> None:
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"{source}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3.")
    for part in ("offload_optimizer", "offload_param"):
        value = zero.get(part, {})
        if not isinstance(value, dict):
            raise UserError(f"{source}: zero_optimization.{part} is {value!r}; it must be an object of DeepSpeed's fields.")
        if value.get("device", "none") not in ("none", "cpu"):
            raise UserError(
                f'{source}: zero_optimization.{part}.device is "{value["device"]}"; checkpoints here know "none" and "cpu".'
            )
