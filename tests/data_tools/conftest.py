"""What several tests of the offline jobs need."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import encode


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random VAE of the usual form: 8x down, 4 channels."""
    from tests.data.test_codec import small_vae

    folder = tmp_path_factory.mktemp("vae")
    small_vae(block_out_channels=(4, 4, 4, 8), norm_num_groups=2).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_class_shards(tmp_path: Path, vae: str) -> Callable[[], Path]:
    """Returns a function that encodes six pictures of three classes into three shards, and returns their folder."""

    def make() -> Path:
        random = np.random.default_rng(0)
        for number in range(6):
            folder = tmp_path / "pictures" / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
        given = ["--dataset", "image_folder", "--root", str(tmp_path / "pictures"), "--out", str(tmp_path / "shards")]
        encode.main([*given, "--vae", vae, "--resolution", "32", "--samples-per-shard", "2", "--processes", "0"])
        return tmp_path / "shards"

    return make
