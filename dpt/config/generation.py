"""The section "generation" of a recipe: how class-conditional images are scored."""

from dataclasses import dataclass
from typing import Literal

from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, Range
from dpt.config.sections.checking import check, check_fields


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How generated images are compared with real ones. How they are sampled is said in dpt.evaluation."""

    reference: str = ""
    """Real images: class shards, a folder of pictures, or an .npz of images or statistics; empty: nothing is generated."""
    images: str = ""
    """Ready-made images to score instead of generated ones: a folder or an .npz."""
    num_images: int = 50_000
    """Images generated."""
    labels: Literal["balanced", "shares"] = "balanced"
    """Classes of the images: all equally often, or by the shares of the labels in the reference shards."""
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
    """Nearest neighbour that the balls of precision and recall reach to."""
    manifold_images: int = 10_000
    """Real images that precision and recall look at, evenly spaced in the reference."""
    save_reference: str = ""
    """File for the reference's statistics, an .npz to be given as reference later; empty: not kept."""

    def __post_init__(self) -> None:
        check_fields(self, "dpt.generation", Range(least=2), "num_images")
        check_fields(self, "dpt.generation", NOT_NEGATIVE, "guidance_channels")
        check_fields(self, "dpt.generation", AT_LEAST_1, "neighbours", "manifold_images")
        check(
            not self.save_reference or self.save_reference.endswith(".npz"),
            f"dpt.generation.save_reference is {self.save_reference!r}; its name must end in .npz.",
        )
