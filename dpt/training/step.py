"""One training step's mathematics: from a batch of the stream to the network's inputs and the loss.

All random numbers belong to samples (`dpt.diffusion.noise`), so splitting a batch over ranks and micro-batches
changes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpt.config.recipe import DptConfig
from dpt.data.codec import LatentScaling, mean_latents, sample_latents
from dpt.diffusion.noise import RandomNumbers, initial_noise, uniform
from dpt.diffusion.objective import DiffusionObjective
from dpt.errors import UserError
from dpt.models.costs import kept_tokens, num_tokens
from dpt.models.dit import DiT, DiTOutput
from dpt.models.moe import EarlierRouting
from dpt.tasks import TASKS, label_id
from dpt.training.alignment import Projectors, Teacher, feature_alignment_loss, self_alignment_loss, watched_blocks
from dpt.training.pixel_loss import PixelLoss


class Inputs(NamedTuple):
    """A micro-batch of B samples, on the training device."""

    network_input: Tensor
    """[B, C (num_conditions + 1), h, w] in the compute type: clean conditions, then the noisy latents."""
    timesteps: Tensor
    """int64 [B]."""
    labels: Tensor
    """int64 [B], dropped ones replaced by the null label."""
    embeddings: Tensor | None
    """[B, clip_embedding_size] or None."""
    task_labels: Tensor
    """int64 [B], the labels before dropping."""
    latents: Tensor
    """float32 [B, C, h, w], clean."""
    noise: Tensor
    """float32 [B, C, h, w]."""
    noisy_latents: Tensor
    """float32 [B, C, h, w]."""
    valid: Tensor | None
    """uint8 [B, h, w], 1 where the loss counts; None: everywhere."""
    kept: Tensor | None = None
    """int64 [B, K], in order: tokens that go through the blocks that the others bypass; None: all tokens."""
    teacher_input: Tensor | None = None
    """Like network_input, with less noisy latents, for self-alignment."""
    teacher_timesteps: Tensor | None = None
    """int64 [B], of the noise in teacher_input."""
    features: Tensor | None = None
    """float16 [B, C, h, w]: the features that hidden states are aligned with."""


class Losses(NamedTuple):
    """The training module's outputs: float32 scalars (means over the micro-batch), and the experts' loads."""

    total: Tensor
    """The differentiated total: loss + weighted balance, z and alignment losses."""
    loss: Tensor
    """The main loss: mse + vlb_weight vlb, or latent_weight mse + weight pixel."""
    mse: Tensor
    vlb: Tensor
    pixel: Tensor
    """Loss of decoded predictions, unweighted; 0 if there is none."""
    balance: Tensor
    """Load-balancing loss summed over layers, unweighted, of all ranks' tokens: this micro-batch's contribution to its mean."""
    z: Tensor
    """Router z-loss summed over layers, unweighted, of all ranks' tokens."""
    self_alignment: Tensor
    """Unweighted; 0 if not used."""
    feature_alignment: Tensor
    """Unweighted; 0 if not used."""
    tokens_per_expert: Tensor
    """int64 [L, E], of all ranks' tokens."""
    router_probs: Tensor
    """float64 [L, E], mean probabilities of all ranks' tokens."""
    router_entropy: Tensor
    """float64 [L], mean entropy of a token's probabilities, in nats, of all ranks' tokens."""
    dropped_share: Tensor


class LossModule(nn.Module):
    """The network with its objective, DeepSpeed's model. `forward` takes the fields of `Inputs`, and sums of the routing in the
    step's earlier micro-batches."""

    def __init__(self, network: DiT, config: DptConfig, pixel_loss: PixelLoss | None = None) -> None:
        super().__init__()
        self.pixel_loss, self.pixel_config = pixel_loss, config.pixel_loss
        self.network = network
        if config.training.bypass_share:
            network.set_bypass(config.training.bypassed(network.config.depth))
        self.objective = DiffusionObjective(config.diffusion)
        self.training_config = config.training
        self.alignment, self.aligned = Projectors(config), watched_blocks(config)
        self.teacher = Teacher(config) if config.training.self_alignment.weight else None
        network.watch_blocks(set(self.aligned.values()))

    def forward(
        self,
        network_input: Tensor,
        timesteps: Tensor,
        labels: Tensor,
        embeddings: Tensor | None,
        task_labels: Tensor,
        latents: Tensor,
        noise: Tensor,
        noisy_latents: Tensor,
        valid: Tensor | None,
        kept: Tensor | None = None,
        teacher_input: Tensor | None = None,
        teacher_timesteps: Tensor | None = None,
        features: Tensor | None = None,
        earlier: EarlierRouting | None = None,
    ) -> Losses:
        taught = None
        if self.teacher is not None and teacher_input is not None and teacher_timesteps is not None:
            times = self.objective.network_time(teacher_timesteps)
            taught = self.teacher(teacher_input, times, labels, embeddings, task_labels)
        times = self.objective.network_time(timesteps)
        out = self.network(network_input, times, labels, embeddings, task_labels, earlier, kept)
        losses = self.objective.loss(out.prediction, latents, noise, noisy_latents, timesteps, valid)
        loss, mse = losses["loss"], losses["mse"]
        pixel = torch.zeros_like(mse)
        if self.pixel_loss is not None:
            clean = self.objective.clean(out.prediction, noisy_latents, timesteps)
            pixel = self.pixel_loss(clean, latents, task_labels, valid)
            loss = self.pixel_config.latent_weight * loss + self.pixel_config.weight * pixel
        own, to_features = self._alignment(out, taught, features, latents)
        config = self.training_config
        total = loss + config.balance_loss_weight * out.load_balancing_loss + config.router_z_loss_weight * out.router_z_loss
        total = total + config.self_alignment.weight * own + config.feature_alignment.weight * to_features
        return Losses(
            total=total,
            loss=loss.detach(),
            mse=mse.detach(),
            vlb=losses.get("vlb", torch.zeros_like(mse)).detach(),
            pixel=pixel.detach(),
            balance=out.load_balancing_loss.detach(),
            z=out.router_z_loss.detach(),
            self_alignment=own.detach(),
            feature_alignment=to_features.detach(),
            tokens_per_expert=out.tokens_per_expert,
            router_probs=out.router_probs,
            router_entropy=out.router_entropy,
            dropped_share=out.dropped_share,
        )

    def _alignment(
        self, out: DiTOutput, taught: Tensor | None, features: Tensor | None, latents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The unweighted alignment losses of hidden states: with the teacher's, and with the features."""
        own = to_features = latents.new_zeros(())
        if taught is not None:
            own = self_alignment_loss(self.alignment.project("self", out.hidden[self.aligned["self"]]), taught)
        if features is not None:
            projected = self.alignment.project("features", out.hidden[self.aligned["features"]])
            patch = self.network.config.patch_size
            grid = (latents.shape[2] // patch, latents.shape[3] // patch)
            to_features = feature_alignment_loss(projected, features, grid)
        return own, to_features


class Preparation:
    """Turns a stream's batches into `Inputs`: posterior samples, flips, label drops, timesteps, noise, conditions."""

    def __init__(
        self, config: DptConfig, *, tasks: Sequence[str], scaling: LatentScaling, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`tasks`: one per source of the stream. `scaling`: of the latents' VAE. `dtype`: the network's compute dtype."""
        self.config = config
        self.objective = DiffusionObjective(config.diffusion)
        self.scaling, self.device, self.dtype = scaling.to(device), device, dtype
        if config.task != "class":
            self._targets = _target_labels(config, tasks, device)

    def __call__(self, batch: Mapping[str, Any]) -> Inputs:
        """Raise UserError if a sample's label is beyond the network's classes."""
        if self.config.task == "class":
            _check_labels(batch, self.config.model.num_classes)
        batch = {n: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for n, v in batch.items()}
        draws = RandomNumbers(self.config.training.seed, batch["sample_index"])
        if self.config.task == "class":
            moments, labels = self._image(batch, draws), batch["label"]
        else:
            moments, labels = self._target(batch, draws)
        latents = self._latents(moments, draws)
        diffusion = self.config.diffusion
        timesteps = draws.timesteps(diffusion)
        if diffusion.initial_noise == "random":
            noise = draws.noise(latents.shape[1:], strength=self.objective.noise_strength(timesteps))
        else:
            noise = initial_noise(diffusion.initial_noise, draws.seeds("noise"), latents.shape[1:])
        noisy_latents = self.objective.add_noise(latents, noise, timesteps)
        dropped = draws.uniform("label_drop") < self.config.model.class_dropout_prob
        conditions = self._conditions(batch)
        easier = self._easier(timesteps, draws)
        easier_latents = None if easier is None else self.objective.add_noise(latents, noise, easier)
        return Inputs(
            network_input=self._joined(conditions, noisy_latents),
            timesteps=timesteps,
            labels=torch.where(dropped, self.config.model.num_classes, labels),
            embeddings=batch["clip"].to(self.dtype) if self.config.model.clip_embedding_size and "clip" in batch else None,
            task_labels=labels,
            latents=latents,
            noise=noise,
            noisy_latents=noisy_latents,
            valid=batch.get("valid"),
            kept=self._kept(latents.shape[2:], draws),
            teacher_input=None if easier_latents is None else self._joined(conditions, easier_latents),
            teacher_timesteps=easier,
            features=batch["features"] if self.config.training.feature_alignment.weight else None,
        )

    def _joined(self, conditions: list[Tensor], noisy_latents: Tensor) -> Tensor:
        """The network's input."""
        return torch.cat([*conditions, noisy_latents], dim=1).to(self.dtype)

    def _easier(self, timesteps: Tensor, draws: RandomNumbers) -> Tensor | None:
        """The teacher's timesteps: each sample's own random step towards less noise than the network's."""
        own = self.config.training.self_alignment
        if not own.weight:
            return None
        share = own.offset_low + (own.offset_high - own.offset_low) * draws.uniform("self_alignment").double()
        return (timesteps - (share * self.config.diffusion.num_train_timesteps).round().long()).clamp(min=0)

    def _kept(self, size: Sequence[int], draws: RandomNumbers) -> Tensor | None:
        """Each sample's own random choice of tokens, however the batch is split."""
        share = self.config.training.bypass_share
        if not share:
            return None
        tokens = num_tokens(self.config.model, *size)
        order = uniform(draws.seeds("bypass"), (tokens,)).argsort(dim=1, stable=True)
        return order[:, : kept_tokens(tokens, share)].sort(dim=1).values

    def _image(self, batch: Mapping[str, Any], draws: RandomNumbers) -> Tensor:
        """The image's moments [B, 2, C, h, w], mirrored half of the time if enabled."""
        if not self.config.data.horizontal_flip:
            return batch["latents"]
        flipped = (draws.uniform("flip") < 0.5)[:, None, None, None, None]
        return torch.where(flipped, batch["latents_mirrored"], batch["latents"])

    def _target(self, batch: Mapping[str, Any], draws: RandomNumbers) -> tuple[Tensor, Tensor]:
        """One target's moments [B, 2, C, h, w], each of its source's targets equally often, and its label int64 [B]."""
        counts, labels = self._targets
        source = batch["source"]
        choice = (draws.uniform("target") * counts[source]).long()
        moments = batch["target_latents"][torch.arange(len(choice), device=self.device), choice]  # from [B, M, 2, C, h, w]
        return moments, labels[source, choice]

    def _latents(self, moments: Tensor, draws: RandomNumbers) -> Tensor:
        if self.config.data.posterior == "mean":
            return mean_latents(moments, self.scaling)
        return sample_latents(moments, self.scaling, draws.normal("posterior", moments.shape[2:]))

    def _conditions(self, batch: Mapping[str, Any]) -> list[Tensor]:
        count = self.config.model.num_conditions
        if not count:
            return []
        return [mean_latents(batch["cond_latents"][:, :count], self.scaling).flatten(1, 2)]


def _check_labels(batch: Mapping[str, Any], num_classes: int) -> None:
    """Check every batch on the CPU, as shards of other programs may not state their classes."""
    worst = int(batch["label"].argmax())
    if batch["label"][worst] >= num_classes:
        raise UserError(
            f"sample {batch['key'][worst]} has label {int(batch['label'][worst])}, dpt.model.num_classes is {num_classes}; "
            "raise it, or choose other shards."
        )


def _target_labels(config: DptConfig, tasks: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Each source's number of targets, int64 [S], and their labels, int64 [S, most targets]."""
    names = [TASKS[task].targets for task in tasks]
    labels = torch.zeros(len(names), max(map(len, names)), dtype=torch.int64)
    for source, targets in enumerate(names):
        for number, target in enumerate(targets):
            labels[source, number] = label_id(target, trained_task=config.task, num_classes=config.model.num_classes)
    return torch.tensor([len(targets) for targets in names], device=device), labels.to(device)
