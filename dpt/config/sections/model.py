"""The network, and its upcycling."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, SHARE, Range
from dpt.config.sections.checking import check, check_fields

Task = Literal["class", "depth", "flow", "amodal", "generalist"]
CONDITIONS: dict[str, tuple[int, int]] = {
    "class": (0, 0),
    "depth": (1, 2),
    "flow": (2, 2),
    "amodal": (2, 2),
    "generalist": (2, 2),
}
"""Fewest and most condition latents (`model.num_conditions`) of each task; `dpt.tasks.register_task` adds to them."""
TIMESTEP_FEATURES = 256
"""Width of the sinusoidal timestep features in DiT."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network's architecture. A preset fills the sizes; any field set beside it overrides the preset's."""

    preset: str = "S/2"
    """Named size that fills the fields below (`dpt presets` lists them)."""
    input_size: int = 32
    """Side of the latents in latent pixels (image side / 8); the network also takes other sizes."""
    patch_size: int = 2
    """Side of a token's patch, in latent pixels."""
    in_channels: int = 4
    """Channels of one latent image."""
    num_conditions: int = 0
    """Condition latents concatenated before the noisy one, along channels (1: image; 2: image and prompt)."""
    hidden_size: int = 384
    """Width of the residual stream."""
    depth: int = 12
    """Number of transformer blocks."""
    num_heads: int = 6
    """Attention heads; divides hidden_size."""
    mlp_ratio: float = 4.0
    """Width of the MLP (and of a routed expert) over hidden_size."""
    mlp_kernel_size: int = 0
    """Side of a depthwise convolution over the tokens' grid inside each MLP (Mix-FFN, SegFormer; SANA: 3); 0: none."""
    num_classes: int = 1000
    """Labels, task labels included; the null label's id is num_classes."""
    class_dropout_prob: float = 0.1
    """Probability of replacing a label by the null label in training."""
    learn_sigma: bool = True
    """Predict the variance too (twice the output channels)."""
    qk_norm: bool = False
    """Normalise queries and keys per head (LayerNorm)."""
    mlp_norm_eps: float = 1e-6
    """Epsilon of the norm before each MLP (diffusers' DiT: 1e-5; all other norms have 1e-6)."""
    timestep_features: Literal["dit", "diffusers"] = "dit"
    """Frequencies of the timestep features, i = 0..127: DiT's 10000^(-i/128), or diffusers' 10000^(-i/127)."""
    patch_embed_tasks: int = 0
    """Number of input convolutions, one per task, selected by the task label (PatchEmbedRouter); 0: one for all."""
    clip_embedding_size: int = 0
    """Width of the CLIP image embedding added to the conditioning vector; 0: none."""
    num_experts: int = 0
    """Routed experts in each block; 0: a dense MLP."""
    top_k: int = 2
    """Experts that each token is sent to."""
    expert_activation: Literal["swiglu", "gelu"] = "swiglu"
    """SwiGLU without biases (trained from scratch) or the dense GELU MLP with biases (upcycled)."""
    router_gate: Literal["softmax", "sigmoid"] = "softmax"
    """How a router's scores become experts' weights: softmax over all experts, or each expert's own sigmoid (DeepSeek-V3)."""
    shared_expert_width: int = 0
    """Width of the shared SwiGLU expert, which every token passes through; 0: none."""
    normalize_top_k: bool = False
    """Rescale each token's top-k router weights to sum to 1."""
    capacity_factor: float = 0.0
    """Maximum tokens per expert, as a multiple of the even share; further ones are dropped. 0: no limit."""
    router_bias_balancing: bool = False
    """Balance experts by a routing bias, instead of or besides the balance loss."""
    base_width: int = 0
    """muP: the hidden_size for which the learning rate was tuned; 0: the standard parametrisation."""
    base_head_size: int = 64
    """muP: head size at which attention scores have the usual scale; they are divided by the head size, not its root."""

    def __post_init__(self) -> None:
        sizes = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes", "top_k")
        counts = ("num_conditions", "patch_embed_tasks", "clip_embedding_size", "num_experts", "shared_expert_width")
        check_fields(self, "dpt.model", AT_LEAST_1, *sizes, "base_head_size")
        check_fields(self, "dpt.model", NOT_NEGATIVE, *counts, "base_width", "capacity_factor", "mlp_kernel_size")
        check_fields(self, "dpt.model", POSITIVE, "mlp_norm_eps")
        check_fields(self, "dpt.model", Range(least=0, below=1), "class_dropout_prob")
        check(
            self.patch_embed_tasks <= self.num_classes,
            f"dpt.model.patch_embed_tasks {self.patch_embed_tasks} is more than dpt.model.num_classes {self.num_classes}, "
            "the last of which are the tasks' labels; raise num_classes.",
        )
        check(self.mlp_width >= 1, f"dpt.model.mlp_ratio is {self.mlp_ratio}; the MLP would have no width.")
        for part, whole in (("num_heads", "hidden_size"), ("patch_size", "input_size")):
            check(
                getattr(self, whole) % getattr(self, part) == 0,
                f"dpt.model.{part} {getattr(self, part)} does not divide dpt.model.{whole} {getattr(self, whole)}; choose a "
                "divisor.",
            )
        check(
            self.hidden_size % 4 == 0,
            f"dpt.model.hidden_size {self.hidden_size} is no multiple of 4, which the 2-D sin-cos position table needs.",
        )
        check(
            self.num_experts == 0 or self.top_k <= self.num_experts,
            f"dpt.model.top_k {self.top_k} is more than dpt.model.num_experts {self.num_experts}; lower top_k.",
        )

        check(
            self.mlp_kernel_size % 2 == 1 or self.mlp_kernel_size == 0,
            f"dpt.model.mlp_kernel_size is {self.mlp_kernel_size}, but a convolution centred on a token has an odd side; "
            "choose 3 or 5.",
        )
        check(
            self.mlp_kernel_size == 0 or self.num_experts == 0,
            f"dpt.model.mlp_kernel_size is {self.mlp_kernel_size}, but experts see single tokens, not their neighbours; "
            "set it to 0, or dpt.model.num_experts to 0.",
        )

    @property
    def width_ratio(self) -> float:
        """muP's width multiplier: hidden_size over base_width; 1 without muP."""
        return self.hidden_size / self.base_width if self.base_width else 1.0

    @property
    def attention_scale(self) -> float:
        """The factor that multiplies attention scores q.k."""
        head_size = self.hidden_size // self.num_heads
        return math.sqrt(self.base_head_size) / head_size if self.base_width else 1.0 / math.sqrt(head_size)

    @property
    def mlp_width(self) -> int:
        """Width of the MLP and of each routed expert."""
        return round(self.hidden_size * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class UpcyclingConfig:
    """How a dense network becomes a Mixture-of-Experts (launchers/upcycle.py)."""

    num_experts: int = 8
    """Copies of each MLP."""
    top_k: int = 2
    """Experts that each token is sent to."""
    normalize_top_k: bool = True
    """Rescale top-k weights to sum to 1, so that the upcycled network equals the dense one at step 0."""
    granularity: int = 1
    """Number of finer experts that each copy is split into."""
    noise_std: float = 0.0
    """Noise added to the copies, in units of each weight's own standard deviation, to break their symmetry."""
    reinit_share: float = 0.0
    """Share of each copy's hidden units that are reinitialised (Drop-Upcycling: 0.5); 0: exact copies."""

    def __post_init__(self) -> None:
        check_fields(self, "dpt.upcycling", AT_LEAST_1, "num_experts", "granularity")
        check_fields(self, "dpt.upcycling", NOT_NEGATIVE, "noise_std")
        check_fields(self, "dpt.upcycling", SHARE, "reinit_share")
        check(
            1 <= self.top_k <= self.num_experts,
            f"dpt.upcycling.top_k is {self.top_k}; it must be between 1 and num_experts ({self.num_experts}).",
        )
        check(
            self.reinit_share == 0 or self.num_experts > 1,
            f"dpt.upcycling.reinit_share is {self.reinit_share}, but num_experts is 1, which has no other to differ from; set "
            "it to 0.",
        )

    def apply(self, dense: ModelConfig) -> ModelConfig:
        """The architecture that upcycling makes of a dense one: num_experts copies of each MLP, split granularity times."""
        return replace(
            dense,
            num_experts=self.num_experts * self.granularity,
            top_k=self.top_k * self.granularity,
            mlp_ratio=dense.mlp_ratio / self.granularity,
            expert_activation="gelu",
            normalize_top_k=self.normalize_top_k,
        )
