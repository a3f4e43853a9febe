"""What several tests of the offline jobs need."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random VAE of the usual form: 8x down, 4 channels."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = 4
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(4, 4, 4, 8),
        norm_num_groups=2,
        layers_per_block=1,
    )
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_class_shards(tmp_path: Path, tiny_vae: str) -> Callable[[], Path]:
    """Returns a function that encodes six pictures of three classes into three shards, and returns their folder."""

    def make() -> Path:
        from data_tools import encode

        random = np.random.default_rng(0)
        for number in range(6):
            folder = tmp_path / "pictures" / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
        given = ["--dataset", "image_folder", "--root", str(tmp_path / "pictures"), "--out", str(tmp_path / "shards")]
        encode.main([*given, "--vae", tiny_vae, "--resolution", "32", "--samples-per-shard", "2", "--processes", "0"])
        return tmp_path / "shards"

    return make
