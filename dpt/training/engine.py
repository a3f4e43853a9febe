"""DeepSpeed's engine for a recipe, hiding the differences between its optimizers."""

import contextlib
import copy
import io
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpt import distributed
from dpt.config.checks import batch_split, trains_with_muon
from dpt.config.recipe import Recipe
from dpt.errors import UserError
from dpt.models.memory import REDUCE_BUCKET_SIZE
from dpt.training import deepspeed_internals as internals
from dpt.training.fragments import fragments
from dpt.training.groups import parameter_groups
from dpt.training.muon import Muon
from dpt.training.optimizer import AdamWEMA, optimizer_options

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of an optimizer step, the same on all ranks."""

    applied: bool
    """False if gradients were not finite and nothing was changed."""
    grad_norm: float
    """Global norm of the averaged gradient before clipping; not finite if the step was skipped."""


class Engine:
    """A network under training: forward and backward passes, optimizer steps, and the states behind them."""

    def __init__(self, recipe: Recipe, module: nn.Module) -> None:
        """Hand `module` (its forward returns the loss first) to DeepSpeed. UserError for what DeepSpeed cannot do."""
        _check(recipe)
        self.recipe = recipe
        self.dtype = _PRECISIONS[recipe.precision]
        self.global_batch_size, self.micro_batch_size, self.accumulation = batch_split(recipe, distributed.world_size())
        import deepspeed

        numel = sum(p.numel() for p in module.parameters())
        config = deepspeed_config(recipe, distributed.world_size(), numel)
        options = optimizer_options(recipe.deepspeed.get("optimizer", {}))
        self.base_lr: float = options["lr"]
        training = recipe.dpt.training
        with_muon = trains_with_muon(recipe.deepspeed.get("optimizer", {}))
        self.optimizer = (Muon if with_muon else AdamWEMA)(
            parameter_groups(module, recipe.dpt.model, options["weight_decay"], with_muon=with_muon),
            options | {"lr": 0.0},  # `step` sets it; some of DeepSpeed's optimizers rehearse a step, which must change nothing
            ema_decays=training.ema_decays,
            ema_warmup=training.ema_warmup,
            ema_lengths=training.ema_lengths,
        )
        _let_deepspeed_check(config, recipe.path or "the command line")
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints memory tables
            self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        if distributed.world_size() == 1 and not internals.reduces_gradients(self.deepspeed.optimizer):
            internals.keep_gradients(self.deepspeed)  # it would needlessly copy all gradients into buckets and back
        internals.sum_gradients_directly(self.deepspeed.optimizer)
        self.optimizer.state.clear()
        if isinstance(self.optimizer, Muon):
            self.optimizer.set_layout(fragments(self.deepspeed))
        self.module = module
        self.device: torch.device = self.deepspeed.device

    def accumulate(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Run the forward and backward pass of one micro-batch; return the module's outputs, detached."""
        outputs = self.deepspeed(*inputs)
        self.deepspeed.backward(outputs[0])
        return tuple(o.detach() if isinstance(o, Tensor) else o for o in outputs)

    def end_micro_batch(self) -> None:
        """Tell DeepSpeed that a micro-batch other than the step's last is done."""
        assert not self.deepspeed.is_gradient_accumulation_boundary()
        self.deepspeed.step()

    def step(self, lr: float) -> StepResult:
        """Update the weights with learning rate `lr`, unless the gradients are not finite on some rank."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr / group["rate_divisor"]
        wrapper = self.deepspeed.optimizer
        if wrapper is not self.optimizer:
            self.deepspeed.step()
            applied, norm = not internals.overflowed(wrapper), internals.grad_norm(wrapper)
        else:  # ZeRO 0 in fp32 neither measures nor checks
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
            applied = math.isfinite(norm)
            if applied:
                self.deepspeed.step()
            else:
                internals.drop_step(self.deepspeed)
        self.optimizer.updates += applied
        return StepResult(applied=applied, grad_norm=norm if applied else math.inf)

    @property
    def loss_scaler(self) -> Any:
        """DeepSpeed's loss scaler (its plain attributes are its state), or None."""
        return internals.loss_scaler(self.deepspeed.optimizer)


def deepspeed_config(recipe: Recipe, world_size: int, numel: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the recipe's own keys, the batch split over `world_size` ranks, and our defaults.

    `numel`: parameters of the model. The optimizer is ours, and so is the schedule of the learning rate.
    """
    config = copy.deepcopy(recipe.deepspeed)
    config.pop("optimizer", None)
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config |= dict(zip(names, batch_split(recipe, world_size), strict=True))
    config.setdefault("steps_per_print", None)
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    zero = config.setdefault("zero_optimization", {"stage": 0})
    zero.setdefault("reduce_bucket_size", min(REDUCE_BUCKET_SIZE, max(numel, 1)))
    if recipe.precision == "bf16":
        config["bf16"].setdefault("check_grad_overflow", True)
        config["bf16"].setdefault("immediate_grad_update", True)  # into the float32 sums in the backward pass, freeing them
        if recipe.zero_stage > 0:  # gradients are summed over micro-batches and over ranks in fp32
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
            config.setdefault("communication_data_type", "fp32")
        if recipe.zero_stage == 2:
            zero.setdefault("overlap_comm", True)
            zero.setdefault("contiguous_gradients", True)
            if world_size == 1 and "offload_optimizer" not in zero:
                zero["stage"] = 1  # nothing to reduce, and no buckets to copy gradients through
    return config


def _let_deepspeed_check(config: dict[str, Any], source: str) -> None:
    """Raise UserError, with DeepSpeed's reason, for values of its own keys that it rejects."""
    from deepspeed.runtime.config import DeepSpeedConfig

    checked = {name: value for name, value in config.items() if name not in ("train_batch_size", "gradient_accumulation_steps")}
    try:  # without the batch split: already right, and DeepSpeed would multiply it by the ranks known so far
        with contextlib.redirect_stdout(io.StringIO()):
            DeepSpeedConfig(copy.deepcopy(checked))
    except Exception as error:  # pydantic's, assertions, and DeepSpeed's own, by the key
        errors = getattr(error, "errors", None)
        first = errors()[0] if callable(errors) else {}
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else " ".join(str(error).split())[:200]
        raise UserError(f"{source}: DeepSpeed does not take a value of its keys ({reason}); correct it.") from error


def _check(recipe: Recipe) -> None:
    """Refuse what DeepSpeed would refuse late or do wrong."""
    stage, ep_size, where = recipe.zero_stage, recipe.dpt.training.ep_size, recipe.path or "the command line"
    if "scheduler" in recipe.deepspeed:
        raise UserError(f'{where}: "scheduler" is not used; set dpt.training.lr_schedule, lr_final and warmup_steps instead.')
    if ep_size > 1 and stage == 3:
        raise UserError(
            f"{where}: ZeRO stage 3 cannot partition experts that dpt.training.ep_size {ep_size} spreads over ranks; set "
            "zero_optimization.stage to 2, or dpt.training.ep_size to 1."
        )
    if ep_size > 1 and stage == 0:
        raise UserError(
            f"{where}: ZeRO stage 0 clips by a wrong gradient norm when dpt.training.ep_size is {ep_size}; set "
            "zero_optimization.stage to 1."
        )
    if stage == 0 and recipe.precision == "fp16":
        raise UserError(f"{where}: fp16 needs the loss scaling of ZeRO stage 1 or more; set zero_optimization.stage to 1.")
