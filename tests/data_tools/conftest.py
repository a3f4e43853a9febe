"""What several tests of the offline jobs need."""

import pytest


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
