"""The shards to train on."""

from dataclasses import dataclass, field
from typing import Literal

from dpt.config.numbers import NOT_NEGATIVE
from dpt.config.sections.checking import check, check_fields


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The shards to read, and how."""

    shards: list[str] = field(default_factory=list)
    """Shard folders, brace patterns ("x/{000000..000127}.tar") or URLs; several sets are mixed."""
    weights: list[float] = field(default_factory=list)
    """Share of each set in a mixture; empty: by number of samples."""
    vae: str = "embedded"
    """VAE that made the latents: "embedded", "embedded16" (16 channels), a folder, or a name on the hub; as in the manifest."""
    posterior: Literal["sample", "mean"] = "sample"
    """Train on samples of the VAE posterior (pre-training) or on its mean (perception)."""
    horizontal_flip: bool = False
    """Mirror samples with probability 1/2; the shards must hold mirrored latents."""
    num_workers: int = 0
    """Threads per rank that read shards, and as many that fetch; 0: the thread that fills batches reads, another fetches."""
    cache_dir: str = ""
    """Folder for shards fetched from URLs (it grows to the size of the sets); empty: fetched again every epoch."""
    verify: bool = True
    """Compare each shard's hash with the manifest before its first use, so that flipped bits are reported, never trained on."""
    max_bad_samples: int = 0
    """Unreadable samples that a rank replaces and counts before the run stops."""

    def __post_init__(self) -> None:
        check(
            not self.weights or len(self.weights) == len(self.shards),
            f"dpt.data.weights has {len(self.weights)} entries for {len(self.shards)} sets in dpt.data.shards; give one for "
            "each.",
        )
        check(all(w > 0 for w in self.weights), f"dpt.data.weights {self.weights}: every weight must be positive.")
        check_fields(self, "dpt.data", NOT_NEGATIVE, "num_workers", "max_bad_samples")
