"""Align hidden states with those of the averaged network at less noise, or with features of the shards.

SRA: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation Guidance by
Themselves", 2025. REPA: Yu et al., "Representation Alignment for Generation", 2024; features with spatial structure: Singh et
al., "What matters for Representation Alignment: Global Information or Spatial Structure?" (iREPA), 2025.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpt.config.recipe import DptConfig
from dpt.models.dit import DiT
from dpt.models.products import Linear
from dpt.models.recipe_costs import projector_widths, teacher_model
from dpt.training.engine import Engine
from dpt.training.fragments import copy_weights

_BETA = 0.05
"""Error at which SRA's smooth L1 loss changes from squares to absolute values."""


class Projectors(nn.ModuleDict):
    """A recipe's projectors ("self", "features"): trained and in checkpoints, but not part of exported weights.

    Their initial weights follow from the recipe's seed alone and leave those of the network unchanged.
    """

    def __init__(self, config: DptConfig) -> None:
        super().__init__()
        shapes = projector_widths(config.training, config.model.hidden_size)
        if not shapes:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.training.seed + 2**32)  # other numbers than the network was drawn from
            self.update({name: _projector(widths) for name, widths in shapes.items()})

    def project(self, name: str, hidden: Tensor) -> Tensor:
        """Project hidden states [B, T, D] -> [B, T, C], float32."""
        projected: Tensor = self[name](hidden)
        return projected.float()


def _projector(widths: list[int]) -> nn.Sequential:
    """Linear layers with SiLU between them, as in both papers."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        linear = Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def self_alignment_loss(projected: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 between projected hidden states and the teacher's, both [B, T, D]: the mean, float32 []."""
    return F.smooth_l1_loss(projected, target.float(), beta=_BETA)


def feature_alignment_loss(projected: Tensor, features: Tensor, grid: tuple[int, int]) -> Tensor:
    """One minus the cosine between projected hidden states [B, T, C] and features [B, C, h, w], float32 [].

    Features are averaged over the tokens' `grid` (rows, columns; T of them). A sample's loss is the mean over its tokens whose
    features are not all zero (unknown, or from a set without any); 0 if there are none.
    """
    target = F.adaptive_avg_pool2d(features.float(), grid).flatten(2).mT  # [B, T, C]
    known = (target != 0).any(dim=-1).float()
    errors = known * (1.0 - F.cosine_similarity(projected, target, dim=-1))
    return (errors.sum(dim=1) / known.sum(dim=1).clamp(min=1.0)).mean()


class Teacher:
    """The averaged network up to the teacher's block, whole on each rank, including all experts.

    Not a module: DeepSpeed must neither train nor partition it. It has no state of its own: `refresh` rebuilds it from the
    optimizer's average, so that a run's targets do not depend on where it was stopped.
    """

    def __init__(self, config: DptConfig) -> None:
        self.config = teacher_model(config.training, config.model)
        self.decay, self.compiled = config.training.teaching_decay, config.training.compile
        self.network: DiT | None = None

    @torch.no_grad()
    def refresh(self, engine: Engine) -> None:
        """Load the current average in the compute dtype. Call before a step's forward passes; collective."""
        if self.network is None:
            self.network = self._build(engine)
        state = next(name for name, decay in engine.optimizer.ema_decays.items() if decay == self.decay)
        copy_weights(engine.deepspeed, engine.optimizer, state, self.network)

    def _build(self, engine: Engine) -> DiT:
        with torch.device("meta"):
            network = DiT(self.config)
        network.to(engine.dtype).to_empty(device=engine.device).eval()
        if self.compiled:
            network.compile_blocks()
        return network

    @torch.no_grad()
    def __call__(
        self, network_input: Tensor, times: Tensor, labels: Tensor, embeddings: Tensor | None, task_labels: Tensor
    ) -> Tensor:
        """Return its last block's output [B, T, D] for the network's inputs (`times`: its time input)."""
        assert self.network is not None, "refresh comes first"
        return self.network.last_hidden(network_input, times, labels, embeddings, task_labels)


def watched_blocks(config: DptConfig) -> Mapping[str, int]:
    """The blocks whose outputs are aligned, keyed by projector name."""
    own, features = config.training.self_alignment, config.training.feature_alignment
    found = {"self": own.student_block if own.weight else 0, "features": features.block if features.weight else 0}
    return {name: block for name, block in found.items() if block}
