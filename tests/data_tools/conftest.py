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
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(**blocks, block_out_channels=(4, 4, 4, 8), norm_num_groups=2, layers_per_block=1).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random CLIP image tower: 48 px, embeddings of 6 numbers."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(**sizes, projection_dim=6, image_size=48, patch_size=16)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Returns a function: a command's `main` and its words -> the one sentence that ends it, with exit code 2."""

    def run(main: Callable[[list[str]], object], *words: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        assert caught.value.code == 2
        found = capsys.readouterr().err
        assert "Traceback" not in found
        return found.strip().splitlines()[-1]

    return run


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
