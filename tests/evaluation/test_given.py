import numpy as np
import pytest
from PIL import Image

from dpt.errors import UserError
from dpt.evaluation.given import read_prediction, save_prediction


def test_depth_files(tmp_path):
    depth = np.random.default_rng(0).integers(0, 65535, (6, 8)).astype(np.uint16)
    Image.fromarray(depth).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", depth.astype(np.float64)[..., None])
    for key in ("a", "b"):
        assert (read_prediction(tmp_path, key, "depth", (6, 8)) == depth).all()
    assert read_prediction(tmp_path, "a", "depth", (3, 4)).shape == (3, 4)


def test_flow_files_are_scaled_with_their_size(tmp_path):
    flow = np.stack([np.full((4, 6), 3.0), np.full((4, 6), -1.0)]).astype(np.float32)
    save_prediction(tmp_path, "deep/a", "flow", flow)
    np.save(tmp_path / "b.npy", flow)
    np.save(tmp_path / "c.npy", np.moveaxis(flow, 0, -1))
    for key in ("deep/a", "b", "c"):
        assert (read_prediction(tmp_path, key, "flow", (4, 6)) == flow).all()
    enlarged = read_prediction(tmp_path, "b", "flow", (8, 18))
    assert np.allclose(enlarged[0], 9.0)
    assert np.allclose(enlarged[1], -2.0)


def test_mask_files(tmp_path):
    mask = np.zeros((5, 7), bool)
    mask[1:3, 2:6] = True
    save_prediction(tmp_path, "a", "amodal", mask)
    assert (read_prediction(tmp_path, "a", "amodal", (5, 7)) == mask).all()


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no prediction for a"):
        read_prediction(tmp_path, "a", "depth", (2, 2))
    (tmp_path / "a.png").write_bytes(b"not a picture")
    (tmp_path / "b.flo").write_bytes(b"PIEH" + bytes(20))
    np.save(tmp_path / "c.npy", np.zeros((3, 4, 5)))
    for key, task in (("a", "depth"), ("b", "flow"), ("c", "flow")):
        with pytest.raises(UserError, match=rf"{key}\.(png|flo|npy)"):
            read_prediction(tmp_path, key, task, (2, 2))
