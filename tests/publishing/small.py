"""Small random weights as exported folders, plain and averaged ones different."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpt import tasks
from dpt.config.sections import DiffusionConfig, ModelConfig
from dpt.data.codec import load_vae
from dpt.models.dit import DiT
from dpt.models.exporting import export_weights
from tests.data.test_codec import small_vae

LINEAGE = {"run_id": "f" * 32, "parents": ["e" * 32], "data_sha256": "d" * 64}
LINEAGE |= {"train_macs": 1.5e15, "samples_seen": 6400, "step": 100}


def statistics_vae(folder: Path, channels: int = 8, **changes: Any) -> Path:
    """A VAE of 16 pixels a latent, a shift and statistics by channel."""
    statistics = {"latents_mean": np.linspace(-1, 1, channels).tolist(), "latents_std": np.linspace(0.5, 2, channels).tolist()}
    shape = {"block_out_channels": (8,) * 5, "latent_channels": channels, "scaling_factor": 0.5, "shift_factor": 0.25}
    small_vae(**shape, **statistics, **changes).save_pretrained(folder)
    return folder


def random_state(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Numbers that every part's output depends on."""
    torch.manual_seed(seed)
    state = DiT(config).state_dict()
    noisy = {n: t + 0.08 * torch.randn_like(t) for n, t in state.items() if t.is_floating_point()}
    return state | noisy | {n: torch.randint(-30, 30, t.shape) for n, t in state.items() if not t.is_floating_point()}


def export_small(
    folder: Path,
    *,
    task: str = "depth",
    diffusion: dict[str, Any] | None = None,
    vae: str = "embedded",
    fits: dict[str, Any] | None = None,
    **model: Any,
) -> Path:
    """An export of a network of two narrow blocks for latents of 8 x 8, with its averaged weights."""
    least = {"class": 0, "depth": 2, "generalist": 2, "flow": 2}[task]
    values = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_conditions": least}
    values |= {"num_classes": 10 + tasks.num_task_labels(task)}
    record = load_vae(vae).record
    config = ModelConfig(**{**values, "in_channels": record.latent_channels, **model})
    sections = {"task": task, "vae": asdict(record), "lineage": LINEAGE} | ({"fits": fits} if fits else {})
    sections["diffusion"] = vars(DiffusionConfig(**(diffusion or {})))
    network = DiT(config)
    network.load_state_dict(random_state(config, 0))
    averaged = {n: t for n, t in random_state(config, 1).items() if t.is_floating_point()}
    return export_weights(network, folder, ema=averaged, sections=sections)
