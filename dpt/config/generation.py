"""The section "generation" of a recipe: how class-conditional images are scored."""

from dataclasses import dataclass
from typing import Literal

from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, Range
from dpt.config.sections.checking import check, check_fields


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How generated images are compared with real ones; dpt.evaluation says how they are sampled."""

    reference: str = ""
    """Real images: class shards, a folder of pictures, or an .npz of images or statistics; empty: no images are scored."""
    images: str = ""
    """Images to score instead of generating some: a folder or an .npz."""
    num_images: int = 50_000
    """Images generated."""
    labels: Literal["balanced", "shares"] = "balanced"
    """Classes of the images: balanced, or with the frequencies of the reference shards."""
    guidance_channels: int = 0
    """Latent channels that guidance acts on; 0: all (public DiT: 3)."""
    features: str = ""
    """TorchScript of the feature network; empty: StyleGAN's Inception-v3 in torch.hub's cache."""
    features_sha256: str = ""
    """Hash that the file must have; empty: the documented one of StyleGAN's Inception-v3."""
    dinov2: str = ""
    """DINOv2 for FD-DINOv2: a folder or a hub name, such as facebook/dinov2-large; empty: not computed."""
    dinov2_sha256: str = ""
    """Hash that its model.safetensors must have; empty: the documented one of facebook/dinov2-large."""
    neighbours: int = 3
    """k of the k-th neighbours in precision and recall."""
    manifold_images: int = 10_000
    """Real images for precision and recall, evenly spaced in the reference."""
    save_reference: str = ""
    """An .npz to keep the reference's statistics in, for later use as the reference; empty: not kept."""

    def __post_init__(self) -> None:
        check_fields(self, "dpt.generation", Range(least=2), "num_images")
        check_fields(self, "dpt.generation", NOT_NEGATIVE, "guidance_channels")
        check_fields(self, "dpt.generation", AT_LEAST_1, "neighbours", "manifold_images")
        check(
            not self.save_reference or self.save_reference.endswith(".npz"),
            f"dpt.generation.save_reference is {self.save_reference!r}; its name must end in .npz.",
        )
