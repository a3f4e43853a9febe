"""The Diffusion Transformer, dense or with Mixture-of-Experts blocks, for images and for perception.

Shape legend: B samples, C in_channels, h x w latents, T tokens, D hidden_size, L depth, E experts.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpt.config.presets import preset_values
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models import compiling
from dpt.models.attention import Attention
from dpt.models.layers import (
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    PatchEmbedRouter,
    SwiGLU,
    TimestepEmbedder,
    modulated_norm,
    position_table,
    unpatchify,
)
from dpt.models.moe import EarlierRouting, MoE, Router, RouterStats, summarize
from dpt.models.mup import scale_initial_weights
from dpt.models.products import Linear


class DiTOutput(NamedTuple):
    """The network's output. Losses are 0 and counts empty for a dense network."""

    prediction: Tensor
    """[B, C_out, h, w] in the latents' dtype; C_out = 2 C if learn_sigma: first C the prediction, then the variance values."""
    load_balancing_loss: Tensor
    """float32 [], summed over layers, not yet weighted (`dpt.models.moe.summarize`)."""
    router_z_loss: Tensor
    """float32 [], summed over layers, not yet weighted."""
    tokens_per_expert: Tensor
    """int64 [L, E]: slots routed to each expert."""
    router_probs: Tensor
    """float64 [L, E]: mean router probability of each expert."""
    router_entropy: Tensor
    """float64 [L]: mean entropy of a token's router probabilities, in nats (0: certain, log E: even)."""
    dropped_share: Tensor
    """float32 []: share of routed slots dropped for lack of capacity."""
    hidden: Mapping[int, Tensor] = MappingProxyType({})
    """Block outputs [B, T, D] that `watch_blocks` asked for, keyed by block number (from 1)."""


class DiTBlock(nn.Module):
    """Attention and an MLP (or experts), each modulated and gated by the conditioning (adaLN-Zero, DiT section 3.2)."""

    def __init__(self, config: ModelConfig, ep_size: int) -> None:
        super().__init__()
        size = config.hidden_size
        scale = config.attention_scale if config.base_width else None
        self.attn = Attention(size, config.num_heads, qk_norm=config.qk_norm, scale=scale)
        self.mlp_norm_eps = config.mlp_norm_eps
        self.mlp = None if config.num_experts else Mlp(size, config.mlp_width, config.mlp_kernel_size)
        self.moe = _build_moe(config, ep_size) if config.num_experts else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(size, 6 * size))

    def forward(
        self, x: Tensor, conditioning: Tensor, grid: tuple[int, int] | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """x [B, T, D], conditioning [B or 1, D] -> x [B, T, D] and the router's statistics.

        `grid`: rows and columns of the tokens, which `mlp_kernel_size` needs.
        """
        modulation = self.adaLN_modulation(conditioning).chunk(6, dim=1)  # 6 x [B or 1, D]
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        y = self.attn(modulated_norm(x, shift_attn, scale_attn))  # [B, T, D]
        x = torch.addcmul(x, gate_attn.unsqueeze(1), y)
        y = modulated_norm(x, shift_mlp, scale_mlp, self.mlp_norm_eps)
        stats = None
        if self.moe is not None:
            y, stats = self.moe(y)
        elif self.mlp is not None:
            y = self.mlp(y, grid)
        return torch.addcmul(x, gate_mlp.unsqueeze(1), y), stats


def _build_moe(config: ModelConfig, ep_size: int) -> MoE:
    if ep_size == 1:
        return MoE(config)
    from dpt.models.moe_parallel import ParallelMoE  # imports DeepSpeed, which takes seconds

    return ParallelMoE(config, ep_size)


class DiT(nn.Module):
    """Noisy latents (preceded on the channel axis by clean condition latents), timesteps and labels -> prediction.

    A deterministic function, the same in train() and eval(): labels are dropped by the caller, who puts num_classes (the null
    label) in their place. `ep_size` ranks share the experts of each layer (it divides num_experts). If it is more than 1,
    torch.distributed must be initialised, and DeepSpeed's engine made before the first forward pass: it sets the groups.
    """

    def __init__(self, config: ModelConfig, *, ep_size: int = 1) -> None:
        super().__init__()
        self.config = config
        self.in_channels = config.in_channels * (1 + config.num_conditions)
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.activation_checkpointing = False
        self.bypassed = range(0)
        self.watched: frozenset[int] = frozenset()
        self._positions: dict[tuple[int, int], Tensor] = {}
        size = config.hidden_size
        self.x_embedder: PatchEmbed | PatchEmbedRouter
        if config.patch_embed_tasks:
            self.x_embedder = PatchEmbedRouter(config.patch_embed_tasks, config.patch_size, self.in_channels, size)
        else:
            self.x_embedder = PatchEmbed(config.patch_size, self.in_channels, size)
        self.t_embedder = TimestepEmbedder(size, config.timestep_features)
        self.y_embedder = LabelEmbedder(config.num_classes, size)
        self.clip_embedder = Linear(config.clip_embedding_size, size, bias=False) if config.clip_embedding_size else None
        blocks = nn.ModuleList(DiTBlock(config, ep_size) for _ in range(config.depth))
        self.blocks: Sequence[DiTBlock] = blocks  # type: ignore[assignment]
        self.final_layer = FinalLayer(size, config.patch_size, self.out_channels, config.width_ratio)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as DiT does: xavier-uniform linear layers, and zeros where a block or the network adds its result.

        With `base_width`, each deviation is that of this width times what muP says (`dpt.models.mup`).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, PatchEmbed | PatchEmbedRouter | TimestepEmbedder | LabelEmbedder | Mlp | SwiGLU | Router):
                module.reset_parameters()
            elif isinstance(module, MoE):
                module.reset_experts()
        if self.config.base_width:
            scale_initial_weights(self.named_parameters(), self.config)
        zeros: list[Any] = [b.adaLN_modulation[1] for b in self.blocks]
        zeros += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for linear in zeros:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        if self.clip_embedder is not None:
            nn.init.zeros_(self.clip_embedder.weight)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.activation_checkpointing = enabled

    def set_bypass(self, blocks: range) -> None:
        """Send only the tokens that `forward` is asked to keep through these blocks (TREAD, Krause et al. 2025)."""
        self.bypassed = blocks

    def watch_blocks(self, blocks: Collection[int]) -> None:
        """Return the outputs of these blocks, counted from 1, as `hidden`; none of them may be bypassed."""
        self.watched = frozenset(blocks)

    def compile_blocks(self, **arguments: Any) -> None:
        """Compile each block in place with torch.compile and `arguments`; the defaults are those of `dpt.models.compiling`."""
        for block in self.blocks:
            block.compile(**(arguments or {"options": compiling.options()}))

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        labels: Tensor,
        embeddings: Tensor | None = None,
        task_labels: Tensor | None = None,
        earlier: EarlierRouting | None = None,
        kept: Tensor | None = None,
    ) -> DiTOutput:
        """noisy_latents [B, C (1 + num_conditions), h, w], timesteps [B], labels int64 [B] in 0..num_classes.

        Samples that share their timestep and label may give both as [1]: the conditioning is then computed once.
        `embeddings` [B, clip_embedding_size]: CLIP image embeddings, zeros for samples without one; None is all zeros.
        `task_labels` int64 [B] choose the input convolution if there is one per task (the last patch_embed_tasks labels); None:
        `labels`, which must then hold no null label. `earlier`: sums of `tokens_per_expert` and `router_probs` over the step's
        earlier micro-batches, which the balance loss includes (`dpt.models.moe.summarize`). `kept` int64 [B, K]: the tokens of
        each sample that go through the blocks of `set_bypass`, while the others are carried around them; None: all. Raises
        UserError if h or w is not a multiple of patch_size or the channels are not the model's.
        """
        x, conditioning = self._embed_all(noisy_latents, timesteps, labels, embeddings, task_labels)
        stats, grid = [], self._grid(noisy_latents)
        hidden: dict[int, Tensor] = {}
        carried, index = x, None if kept is None else kept.unsqueeze(-1).expand(-1, -1, x.shape[-1])  # [B, K, D]
        for number, block in enumerate(self.blocks):
            if index is not None and number == self.bypassed.start:
                carried, x = x, x.gather(1, index)
            if index is not None and number == self.bypassed.stop:
                x = carried.scatter(1, index, x)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, routed = checkpoint(block, x, conditioning, grid, use_reentrant=False, preserve_rng_state=False)
            else:
                x, routed = block(x, conditioning, grid)  # [B, T, D]
            stats.append(routed)
            if number + 1 in self.watched:
                hidden[number + 1] = x
        x = self.final_layer(x, conditioning)  # [B, T, p p C_out]
        x = unpatchify(x, self.config.patch_size, *noisy_latents.shape[2:])  # [B, C_out, h, w]
        prediction = x.to(noisy_latents.dtype)
        if not self.config.num_experts:
            zero = torch.zeros((), device=x.device)
            none = torch.zeros(len(self.blocks), 0, dtype=torch.float64, device=x.device)
            return DiTOutput(prediction, zero, zero, none.long(), none, none.sum(dim=1), zero, hidden)
        return DiTOutput(prediction, *summarize(stats, earlier), hidden)

    def last_hidden(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        labels: Tensor,
        embeddings: Tensor | None = None,
        task_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the last block's output [B, T, D] for inputs as `forward` takes them, without making a prediction."""
        x, conditioning = self._embed_all(noisy_latents, timesteps, labels, embeddings, task_labels)
        for block in self.blocks:
            x, _ = block(x, conditioning, self._grid(noisy_latents))
        return x

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of the latents' tokens."""
        height, width = latents.shape[2:]
        return height // self.config.patch_size, width // self.config.patch_size

    def _embed_all(
        self, noisy_latents: Tensor, timesteps: Tensor, labels: Tensor, embeddings: Tensor | None, task_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the blocks' inputs: tokens [B, T, D] and the conditioning [B or 1, D]."""
        tasks = labels if task_labels is None else task_labels
        x = self._embed(noisy_latents, tasks.expand(len(noisy_latents)))
        conditioning = self.t_embedder(timesteps) + self.y_embedder(labels)
        if self.clip_embedder is not None:
            if embeddings is None:  # the projection takes part in every step: its gradient must exist on every rank
                embeddings = conditioning.new_zeros(labels.shape[0], self.config.clip_embedding_size)
            conditioning = conditioning + self.clip_embedder(embeddings.to(conditioning.dtype))
        return x, conditioning

    def _embed(self, latents: Tensor, task_labels: Tensor) -> Tensor:
        """Latents [B, C_in, h, w] -> tokens [B, T, D] with their positions added."""
        p, (_, channels, height, width) = self.config.patch_size, latents.shape
        if height % p or width % p:
            raise UserError(f"latents of {height} x {width} cannot be cut into patches: both sides must be multiples of {p}.")
        if channels != self.in_channels:
            raise UserError(
                f"latents of {channels} channels do not fit: this model takes {self.in_channels} (dpt.model.num_conditions)."
            )
        parameter = self.final_layer.linear.weight
        latents = latents.to(parameter.dtype)
        if isinstance(self.x_embedder, PatchEmbedRouter):
            first_task = self.config.num_classes - self.config.patch_embed_tasks
            x = self.x_embedder(latents, task_labels - first_task)
        else:
            x = self.x_embedder(latents)
        grid = self._grid(latents)
        table = self._positions.get(grid)
        if table is None or table.device != x.device:
            table = position_table(*grid, self.config.hidden_size, x.device)
            self._positions[grid] = table
        return x + table.to(x.dtype)

    @torch.no_grad()
    def update_router_bias(self, tokens_per_expert: Tensor) -> None:
        """Loss-free balancing: move each expert's routing bias a step towards the mean load, then shift each layer's so that
        their mean stays within half a step of zero: a common offset affects no choice and would only grow.

        tokens_per_expert [L, E]: the whole batch's slots, summed over micro-batches; call once per optimizer step. Does nothing
        without `router_bias_balancing` (Wang et al., 2024, Algorithm 1).
        """
        for block, counts in zip(self.blocks, tokens_per_expert, strict=True):
            gate = block.moe.gate if block.moe is not None else None
            if gate is not None and gate.bias_steps is not None:
                counts = counts.to(gate.bias_steps.device).double()
                gate.bias_steps += (counts.mean() - counts).sign().long()
                gate.bias_steps -= gate.bias_steps.double().mean().round().long()


def build_model(model: str | ModelConfig, *, ep_size: int = 1, **overrides: Any) -> DiT:
    """Build the network of a preset ("XL/2") or a config, overriding any ModelConfig field by name.

    `build_model("XL/2", num_experts=8, top_k=2)` is the upcycled form: GELU experts, no shared one. UserError names an unknown
    preset or field.
    """
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    for name in overrides:
        if name not in known:
            raise UserError(f"dpt.model has no field {name!r}; its fields are {', '.join(sorted(known))}.")
    if isinstance(model, str):
        return DiT(ModelConfig(**{**preset_values(model), **overrides}), ep_size=ep_size)
    return DiT(dataclasses.replace(model, **overrides), ep_size=ep_size)
