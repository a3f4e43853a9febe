"""Bytes on each rank in training, from the network's config and the layout. Pure Python, like `dpt.models.costs`."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from dpt.config.presets import PRESETS, preset_values
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models.costs import expert_params, is_swiglu, macs, muon_params, num_params, num_tokens
from dpt.models.vae_costs import VAESize

Precision = Literal["fp32", "bf16", "fp16"]

REDUCE_BUCKET_SIZE = 100_000_000
"""Our zero_optimization.reduce_bucket_size, in elements: several buckets per backward pass, so that they overlap with it."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each rank during training."""

    weights: int
    """Weights in the precision of the matrix products."""
    master_weights: int
    """The optimizer's own float32 copy."""
    gradients: int
    """Gradients, in float32 where bf16 gradients accumulate in it, as our training engine sets for ZeRO 1 to 3."""
    buckets: int
    """DeepSpeed's buffers for exchanging gradients, of default size (ZeRO 1 to 3)."""
    moments: int
    """Adam's two moments, float32; only one for matrices that Muon trains."""
    ema: int
    """Averaged weights, float32."""
    activations: int
    """Activations kept for the backward pass, and its largest temporaries."""
    pictures: int = 0
    """Memory for drawing class pictures beyond the activations' space, which is free by then."""
    orthogonal: int = 0
    """Memory in which Muon makes updates, beyond the activations' space."""
    alignment: int = 0
    """Aligned hidden states: the averaged teacher network, and what projectors keep for the backward pass."""
    decoder: int = 0
    """Pixel loss: the VAE's weights, and what its decoder keeps for the backward pass."""
    host: int = 0
    """Host memory used by offloading; not in `total`."""

    @property
    def total(self) -> int:
        """Total on the device."""
        return sum(getattr(self, f.name) for f in fields(self)) - self.host


def memory(
    config: ModelConfig,
    *,
    ranks: int = 1,
    ep_size: int = 1,
    zero_stage: int = 1,
    micro_batch_size: int = 1,
    precision: Precision = "bf16",
    num_emas: int = 1,
    height: int = 0,
    width: int = 0,
    activation_checkpointing: bool = False,
    offload_optimizer: bool = False,
    offload_param: bool = False,
    pictures: int = 0,
    muon: bool = False,
    projector_params: int = 0,
) -> Memory:
    """Bytes on each of `ranks` when training with AdamW (or Muon) and DeepSpeed's ZeRO stage (0 to 3); latents as in `macs`.

    ZeRO divides over all ranks: optimizer states (stage 1), gradients too (2), weights too (3); those of experts over the ranks
    that hold the same experts, which comes to the same. `offload_optimizer` (stages 1 to 3) and `offload_param` (stage 3) are
    DeepSpeed's, to the CPU. `pictures`: bytes for drawing class pictures (`picture_bytes`). `projector_params`:
    trained beside the network's own (`dpt.models.recipe_costs`). UserError for impossible settings.
    """
    for name, value in (("ranks", ranks), ("ep_size", ep_size), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    if ranks % ep_size or (config.num_experts or 1) % ep_size:
        raise UserError(f"ep_size {ep_size} must divide the ranks ({ranks}) and num_experts ({config.num_experts}).")
    if zero_stage == 3 and ep_size > 1:
        raise UserError(f"ZeRO stage 3 cannot go with ep_size {ep_size}; choose stage 2 or ep_size 1.")
    size = 4 if precision == "fp32" else 2
    count = num_params(config)
    count = replace(count, total=count.total + projector_params)
    held = count.total - count.routed + count.routed // ep_size  # before ZeRO partitioning
    share = math.ceil(count.total / ranks)
    optimizer = share if zero_stage >= 1 else held
    keeps_master = precision != "fp32" or zero_stage >= 1  # ZeRO's partitions are copies in any precision
    if precision == "bf16" and zero_stage == 2 and ranks == 1 and not offload_optimizer:
        zero_stage = 1  # like the engine: nothing to reduce
    tokens = micro_batch_size * num_tokens(config, height, width)
    plan = Memory(
        weights=size * (share if zero_stage == 3 else held),
        master_weights=4 * optimizer if keeps_master else 0,
        gradients=_gradient_bytes(precision, zero_stage, held, share, offloaded=offload_optimizer),
        buckets=_bucket_bytes(precision, zero_stage, held),
        moments=8 * optimizer - (4 * math.ceil(optimizer * muon_params(config)[0] / count.total) if muon else 0),
        ema=4 * num_emas * optimizer,
        activations=_activation_bytes(config, tokens, size, ep_size, activation_checkpointing),
    )
    working = 24 * muon_params(config)[1] // ep_size if muon else 0  # six copies in float32, as on a CPU
    plan = replace(plan, pictures=max(0, pictures - plan.activations), orthogonal=max(0, working - plan.activations))
    return _offloaded(plan, zero_stage, size * share, optimizer=offload_optimizer, param=offload_param)


def _gradient_bytes(precision: Precision, zero_stage: int, held: int, share: int, *, offloaded: bool) -> int:
    """Bytes of gradients of `held` parameters, `share` of them this rank's. bf16 ones are summed in fp32: in stage 1 as soon as
    each exists, but beside the bf16 ones where the optimizer is offloaded."""
    if precision != "bf16" or zero_stage == 0:
        return (4 if precision == "fp32" else 2) * (share if zero_stage >= 2 else held)
    return 4 * share if zero_stage >= 2 else (6 if offloaded else 4) * held


def _bucket_bytes(precision: Precision, zero_stage: int, held: int) -> int:
    """Bytes of reduction buckets. bf16 gradients are reduced in fp32, in stage 2 in two buckets, one filled during the other's
    reduction; in stage 3 in bf16."""
    if zero_stage == 0:
        return 0
    size = 2 if precision == "fp16" or (precision == "bf16" and zero_stage == 3) else 4
    return size * min(held, REDUCE_BUCKET_SIZE) * (2 if precision == "bf16" and zero_stage == 2 else 1)


def _offloaded(plan: Memory, zero_stage: int, share: int, *, optimizer: bool, param: bool) -> Memory:
    """The plan with the parts that DeepSpeed offloads moved to host memory.

    `share`: bytes of a rank's part of the weights, of which the optimizer keeps a copy on the host (stages 1 and 2). The host
    gets a rank's part of the gradients, in float32; stage 1 first collects all of them on the device.
    """
    if optimizer and zero_stage >= 1:
        part = plan.master_weights
        moved = plan.master_weights + plan.moments + plan.ema + part + (share if zero_stage < 3 else 0)
        gradients = plan.gradients if zero_stage == 1 else 0
        plan = replace(plan, master_weights=0, moments=0, ema=0, gradients=gradients, host=plan.host + moved)
    if param and zero_stage == 3:
        plan = replace(plan, weights=0, host=plan.host + plan.weights)
    return plan


def picture_bytes(
    config: ModelConfig,
    vae: VAESize,
    *,
    images: int = 1,
    guided: bool = True,
    precision: Precision = "bf16",
    height: int = 0,
    width: int = 0,
) -> int:
    """Bytes for sampling while training, `images` at a time: class pictures (`dpt.training.sampling`), validation; like `macs`.

    A whole copy of the network, the VAE in float32, and the larger of a forward pass (of two latents if `guided`) and decoding.
    """
    size, latents = 4 if precision == "fp32" else 2, (height or config.input_size) * (width or config.input_size)
    tokens = images * (1 + guided) * num_tokens(config, height, width)
    forward = tokens * (_kept_per_token(config, size) + 2 * config.hidden_size * size)
    decoded = images * 4 * 4 * vae.channels * vae.downsampling**2 * latents
    return size * num_params(config).total + 4 * vae.params + max(forward, decoded)


def _activation_bytes(config: ModelConfig, tokens: int, size: int, ep_size: int, checkpointing: bool) -> int:
    """Largest sum of what autograd keeps and what the backward pass works in, for `tokens` tokens of `size`-byte numbers."""
    d = config.hidden_size
    kept, working = _kept_per_token(config, size), 7 * d * size  # 7: the final layer, and gradients on their way
    if config.num_experts:
        width, swiglu = config.top_k * config.mlp_width, int(is_swiglu(config))
        expert_gradients = config.num_experts // ep_size * expert_params(config) * size  # one block's
        # In the experts' backward pass: gradient of the activation, the activation again, gradient of the first product; later
        # the last two beside the weights' gradients. The shared expert's backward pass is over by then.
        freed = (4 * config.shared_expert_width - 2 * d) * size
        early, late = (3 + swiglu) * width * size, (2 + swiglu) * width * size + expert_gradients // tokens
        working = max(working, max(early, late) - freed)
    blocks = kept + config.depth * d * size if checkpointing else config.depth * kept
    return tokens * (blocks + working)


def _kept_per_token(config: ModelConfig, size: int) -> int:
    """Bytes that one block keeps for the backward pass, per token."""
    d, heads = config.hidden_size, config.num_heads
    wide = 8 * d + 4 * d  # attention: input, norm, modulated, qkv, result, projection; MLP: input, norm, modulated, result
    if config.qk_norm:
        wide += 3 * d
    narrow = 4 * (heads + 4)  # float32: attention's log-sums, both norms' means and deviations
    if config.num_experts:
        k, width = config.top_k, config.mlp_width
        wide += k * (2 * d + width * (2 if is_swiglu(config) else 1)) + 4 * config.shared_expert_width
        narrow += 3 * 4 * config.num_experts + k * (3 * 4 + 4 * 8)  # router in float32; slots' weights and indices
        narrow += 4 * d if size < 4 else 0  # the router's float32 input
    else:
        wide += (3 if config.mlp_kernel_size else 2) * config.mlp_width
    return wide * size + narrow


def preset_table(
    *, ranks: int = 1, ep_size: int = 1, zero_stage: int = 1, micro_batch_size: int = 32, precision: Precision = "bf16"
) -> list[dict[str, Any]]:
    """One row for every preset and upcycled form: parameters, MACs at 256 and 512 px, and bytes per rank (at 256 px).

    `..._checkpointed` is with activation checkpointing. Dense networks are counted with ep_size 1.
    """
    configs = {name: ModelConfig(**preset_values(name)) for name in PRESETS}
    for name, config in list(configs.items()):
        if not config.num_experts and config.patch_size == 2:
            configs[f"{name} upcycled 8E2A"] = ModelConfig(**preset_values(name) | {"num_experts": 8, "top_k": 2})
    parts = ("weights", "master_weights", "gradients", "buckets", "moments", "ema", "activations")
    rows = []
    for name, config in configs.items():
        count, ep = num_params(config), ep_size if config.num_experts else 1
        plain, checkpointed = (
            memory(config, ranks=ranks, ep_size=ep, zero_stage=zero_stage, micro_batch_size=micro_batch_size,
                   precision=precision, activation_checkpointing=checkpointing)
            for checkpointing in (False, True)
        )  # fmt: skip
        row = {"preset": name, "params_total": count.total, "params_active": count.active}
        for pixels, side in ((256, 32), (512, 64)):
            cost = macs(config, side, side)
            row |= {f"forward_macs_{pixels}px": cost.forward, f"training_macs_{pixels}px": cost.training}
        row |= {f"bytes_{part}": getattr(plain, part) for part in parts}
        row |= {"bytes_activations_checkpointed": checkpointed.activations}
        rows.append(row | {"bytes_total": plain.total, "bytes_total_checkpointed": checkpointed.total})
    return rows
