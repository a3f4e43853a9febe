"""The readers on real samples, where they are at hand (shared/data beside the checkout)."""

from pathlib import Path

import numpy as np
import pytest

from data_tools.readers import open_reader

DATA = Path(__file__).resolve().parents[3] / ".." / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not beside the checkout")


def test_hypersim() -> None:
    reader = open_reader("hypersim", DATA / "hypersim", "val")
    assert reader.keys() == ["ai_015_004/rgb_cam_00_fr0002", "ai_044_003/rgb_cam_01_fr0063"]
    for key in reader.keys():  # noqa: SIM118
        sample = reader.read(key)
        assert sample.images[0].shape == (768, 1024, 3)
        assert sample.valid.mean() > 0.95
        assert 0.5 < np.median(sample.depth[sample.valid]) < 20


def test_flying_chairs() -> None:
    train, val = (open_reader("flying_chairs", DATA / "flying_chairs", split) for split in ("train", "val"))
    assert (train.keys(), val.keys()) == (["00006", "00018"], ["00043"])
    sample = val.read("00043")
    assert [image.shape for image in sample.images] == [(384, 512, 3)] * 2
    assert np.abs(sample.flow).max() == pytest.approx(121.48, abs=0.01)


def test_pix2gestalt() -> None:
    train, val = (open_reader("pix2gestalt", DATA / "pix2gestalt", split) for split in ("train", "val"))
    assert len(train.keys()) == 6
    assert val.keys() == ["1000011"]
    for reader in (train, val):
        for key in reader.keys():  # noqa: SIM118
            sample = reader.read(key)
            visible = sample.images[1][..., 0] > 0
            assert 0 < visible.sum() < sample.mask.sum()
            assert (visible & ~sample.mask).mean() < 0.01
            grey = sample.whole.astype(float) @ [0.299, 0.587, 0.114]
            agreement = (grey <= 250) & sample.mask
            assert agreement.sum() / ((grey <= 250) | sample.mask).sum() > 0.8
