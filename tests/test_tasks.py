import numpy as np
import pytest
import torch

from dpt import tasks
from dpt.errors import UserError


def test_labels_of_the_generalist_and_of_specialists():
    ids = [tasks.label_id(t, trained_task="generalist", num_classes=1004) for t in ("depth", "whole", "flow_x", "flow_y")]
    assert ids == [1000, 1001, 1002, 1003]
    assert tasks.label_id("depth", trained_task="depth", num_classes=1000) == 1000  # the null label
    assert [tasks.label_id(t, trained_task="flow", num_classes=1002) for t in ("flow_x", "flow_y")] == [1000, 1001]
    assert [tasks.num_task_labels(t) for t in ("class", "depth", "amodal", "flow", "generalist")] == [0, 0, 0, 2, 4]
    with pytest.raises(UserError, match="cannot predict"):
        tasks.label_id("flow_x", trained_task="depth", num_classes=1000)
    with pytest.raises(UserError, match="unknown"):
        tasks.task_spec("normals")


def test_image_round_trip_is_exact():
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    assert (tasks.image_to_uint8(tasks.image_to_float(image)) == image).all()
    assert tasks.image_to_float(image).dtype == np.float32


def test_nearest_and_smooth_resizing():
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    np.testing.assert_array_equal(tasks.resize_nearest(values, (2, 2)), values[1::2, 1::2])
    np.testing.assert_array_equal(tasks.resize_nearest(values, (8, 8)), values.repeat(2, 0).repeat(2, 1))
    assert torch.equal(tasks.resize_nearest(torch.from_numpy(values), (2, 2)), torch.from_numpy(values[1::2, 1::2].copy()))
    np.testing.assert_allclose(tasks.resize_smooth(np.full((2, 4, 4), 3.0), (7, 9)), 3.0, rtol=1e-6)
    assert tasks.resize_smooth(values, (4, 4)).dtype == np.float32
    assert tasks.resize_image(np.zeros((4, 6, 3), np.uint8), (8, 3)).shape == (8, 3, 3)


def test_fit_size_keeps_aspect_in_multiples():
    assert tasks.fit_size(480, 640, 512) == (384, 512)
    assert tasks.fit_size(375, 1242, 640) == (192, 640)
    assert tasks.fit_size(10, 4000, 256) == (16, 256)


def test_latent_valid_needs_every_pixel():
    valid = np.ones((16, 24), bool)
    valid[3, 9] = False
    assert tasks.latent_valid(valid).tolist() == [[1, 0, 1], [1, 1, 1]]
    assert tasks.mask_image(valid).min() == -1.0
    assert (tasks.all_valid_prompt(4, 6) == 1.0).all()
