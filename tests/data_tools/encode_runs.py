"""What the tests of encoding share: command lines, the VAE alone, what a folder holds."""

from pathlib import Path

import numpy as np
import torch

from dpt.data.codec import load_vae

SIDE = 32


def arguments(root: Path, out: Path, vae: str, *more: str, dataset: str = "image_folder") -> list[str]:
    base = ["--dataset", dataset, "--root", str(root), "--out", str(out), "--vae", vae, "--resolution", str(SIDE)]
    return [*base, "--samples-per-shard", "4", "--batch-size", "3", "--processes", "0", *more]


def encode_alone(vae: str, image: np.ndarray) -> np.ndarray:
    return load_vae(vae).encode(torch.from_numpy(image)[None])[0].numpy()


def contents(root: Path) -> dict[str, bytes]:
    """All files below a folder, by their paths in it."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
