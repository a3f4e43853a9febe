"""A network's costs, from its config alone: parameters and multiply-accumulates. Pure Python, no torch.

One multiply-accumulate (MAC) is two floating-point operations; papers on Diffusion Transformers call MACs "Gflops". Counted are
matrix products, convolutions and attention, as torch's FlopCounterMode does.
"""

import math
from dataclasses import dataclass, replace

from dpt.config.sections import TIMESTEP_FEATURES, ModelConfig
from dpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ParamCount:
    """Parameter counts; the fixed position table at input_size is included, as in the papers."""

    total: int
    active: int
    """Parameters that one token passes through: top_k of the routed experts."""
    routed: int
    """Parameters of the routed experts, which expert parallelism divides."""


@dataclass(frozen=True, kw_only=True)
class Macs:
    """Multiply-accumulates for one sample."""

    forward: int
    training: int
    """Forward and backward pass, nothing computed twice."""
    attention_recompute: int
    """MACs that flash attention's backward pass recomputes; FlopCounterMode counts `training` plus this."""


def num_tokens(config: ModelConfig, height: int = 0, width: int = 0) -> int:
    """Number of tokens in a latent image of height x width (0: input_size); UserError if patches do not divide it."""
    height, width, p = height or config.input_size, width or config.input_size, config.patch_size
    if height % p or width % p:
        raise UserError(f"latents of {height} x {width} cannot be cut into patches: both sides must be multiples of {p}.")
    return (height // p) * (width // p)


def num_params(config: ModelConfig) -> ParamCount:
    """Parameters of `DiT(config)`, in total and per token."""
    d, patch = config.hidden_size, config.patch_size**2
    outside = max(config.patch_embed_tasks, 1) * (_in_channels(config) * patch * d + d)
    outside += num_tokens(config) * d  # position table
    outside += TIMESTEP_FEATURES * d + d + d * d + d  # timesteps
    outside += (config.num_classes + 1) * d + config.clip_embedding_size * d
    outside += 2 * d * d + 2 * d + d * patch * _out_channels(config) + patch * _out_channels(config)  # final layer
    block = 4 * d * d + 4 * d + 6 * d * d + 6 * d  # attention, adaLN
    if config.qk_norm:
        block += 4 * (d // config.num_heads)
    expert = expert_params(config)
    block += config.num_experts * d + 3 * d * config.shared_expert_width if config.num_experts else expert
    routed, used = config.depth * config.num_experts * expert, config.depth * min(config.num_experts, config.top_k) * expert
    return ParamCount(
        total=outside + config.depth * block + routed, active=outside + config.depth * block + used, routed=routed
    )


def macs(config: ModelConfig, height: int = 0, width: int = 0) -> Macs:
    """MACs of one sample of height x width latents (0: input_size), without capacity dropping."""
    d, t, patch = config.hidden_size, num_tokens(config, height, width), config.patch_size**2
    last = 2 * d * d + t * d * patch * _out_channels(config)
    forward = hidden_macs(config, height, width) + last
    return Macs(
        forward=forward,
        training=3 * forward - _input_macs(config, t),  # no gradient with respect to the network's inputs
        attention_recompute=config.depth * t * t * d,
    )


def hidden_macs(config: ModelConfig, height: int = 0, width: int = 0) -> int:
    """MACs of one sample's forward pass up to the last block's output; latents as in `macs`."""
    t, second = num_tokens(config, height, width), config.hidden_size**2  # timesteps' second layer
    return _input_macs(config, t) + second + config.depth * _block_macs(config, t)


def _input_macs(config: ModelConfig, tokens: int) -> int:
    """MACs of the input layers: patches, timestep features, CLIP embeddings."""
    d = config.hidden_size
    patches = tokens * _in_channels(config) * config.patch_size**2 * d
    return patches + TIMESTEP_FEATURES * d + config.clip_embedding_size * d


def _block_macs(config: ModelConfig, tokens: int) -> int:
    """MACs of one block's forward pass: adaLN, attention's products, scores and weighted sums, the MLP or experts."""
    d = config.hidden_size
    return 6 * d * d + 4 * tokens * d * d + 2 * tokens * tokens * d + tokens * _mlp_macs_per_token(config)


def kept_tokens(tokens: int, share: float) -> int:
    """How many of a sample's tokens go through the blocks that a `share` of its tokens bypasses."""
    return max(1, round(tokens * (1.0 - share)))


def with_bypass(whole: Macs, config: ModelConfig, share: float, blocks: int, height: int = 0, width: int = 0) -> Macs:
    """MACs of one sample when a share of its tokens bypasses that many blocks in training; `forward` is unchanged."""
    t = num_tokens(config, height, width)
    kept = kept_tokens(t, share)
    saved = blocks * (_block_macs(config, t) - _block_macs(config, kept))
    recompute = whole.attention_recompute - blocks * (t * t - kept * kept) * config.hidden_size
    return replace(whole, training=whole.training - 3 * saved, attention_recompute=recompute)


def _muon_stacks(config: ModelConfig) -> list[tuple[int, int, int]]:
    """Shapes of the parameters in a block that Muon trains (`dpt.training.muon`): matrices in each, rows and columns."""
    d, width, experts, shared = config.hidden_size, config.mlp_width, config.num_experts, config.shared_expert_width
    inputs = 2 if is_swiglu(config) else 1
    stacks = [(3, d, d), (1, d, d), (6, d, d), (inputs * max(experts, 1), width, d), (max(experts, 1), d, width)]
    return stacks + ([(2, shared, d), (1, d, shared)] if experts and shared else [])


def muon_params(config: ModelConfig) -> tuple[int, int]:
    """Number of elements in all matrices that Muon trains, and in the largest such parameter."""
    sizes = [math.prod(stack) for stack in _muon_stacks(config)]
    return config.depth * sum(sizes), max(sizes)


def muon_macs(config: ModelConfig) -> int:
    """Total MACs of orthogonalising a step's updates: five iterations of three products (`dpt.training.muon`)."""

    def matrix(rows: int, columns: int) -> int:
        short, long = sorted((rows, columns))
        return 5 * short * short * (2 * long + short)

    return config.depth * sum(count * matrix(rows, columns) for count, rows, columns in _muon_stacks(config))


def _in_channels(config: ModelConfig) -> int:
    return config.in_channels * (1 + config.num_conditions)


def _out_channels(config: ModelConfig) -> int:
    return config.in_channels * (2 if config.learn_sigma else 1)


def is_swiglu(config: ModelConfig) -> bool:
    return config.num_experts > 0 and config.expert_activation == "swiglu"


def expert_params(config: ModelConfig) -> int:
    """Parameters of one expert, or of a dense block's MLP."""
    d, width = config.hidden_size, config.mlp_width
    return 3 * d * width if is_swiglu(config) else 2 * d * width + width + d + width * config.mlp_kernel_size**2


def _mlp_macs_per_token(config: ModelConfig) -> int:
    """MACs of a block's MLP, or of its router, top_k experts and shared expert."""
    d, width = config.hidden_size, config.mlp_width
    if not config.num_experts:
        return 2 * d * width + width * config.mlp_kernel_size**2
    matrices = 3 if is_swiglu(config) else 2
    return d * config.num_experts + config.top_k * matrices * d * width + 3 * d * config.shared_expert_width
