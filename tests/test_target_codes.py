from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpt import target_codes, tasks
from dpt.errors import UserError

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


def test_depth_encoding_maps_quantiles_to_plus_minus_one_and_inverts_between_them():
    depth = np.random.default_rng(1).uniform(1.0, 9.0, (40, 60)).astype(np.float32)
    depth[:3] = 0.0
    image, (near, far) = target_codes.encode_depth(depth)
    valid = depth > 0
    assert (near, far) == pytest.approx(tuple(np.quantile(depth[valid], [0.02, 0.98])))
    assert image.shape == (3, 40, 60)
    assert image.dtype == np.float32
    assert image.min() == -1.0
    assert image.max() == 1.0
    inside = valid & (depth >= near) & (depth <= far)
    for array in (image, torch.from_numpy(image)):
        metres = near + np.asarray(target_codes.decode_depth(array)) * (far - near)
        np.testing.assert_allclose(metres[inside], depth[inside], rtol=1e-5)
    assert np.mean(image[0][valid] == 1.0) == pytest.approx(0.02, abs=0.002)


@pytest.mark.parametrize("code", target_codes.DEPTH_CODES)
@pytest.mark.parametrize("spread", [1.5, 4.0, 30.0])
def test_every_depth_code_comes_back_as_depth_between_the_quantiles(code, spread):
    depth = np.random.default_rng(1).uniform(2.0, 2.0 * spread, (40, 60)).astype(np.float32)
    depth[:3] = 0.0
    image, (near, far) = target_codes.encode_depth(depth, code=code)
    linear, _ = target_codes.encode_depth(depth)
    assert (image.min(), image.max()) == (-1.0, pytest.approx(1.0))
    assert image.dtype == np.float32
    for array in (image, torch.from_numpy(image)):
        decoded = np.asarray(target_codes.decode_depth(array, code))
        np.testing.assert_allclose(decoded, np.asarray(target_codes.decode_depth(linear)), atol=1e-5)
        inside = (depth >= near) & (depth <= far)
        np.testing.assert_allclose(near + decoded[inside] * (far - near), depth[inside], rtol=1e-4)


@pytest.mark.parametrize(("code", "function"), [("log", np.log), ("disparity", lambda depth: -1.0 / depth)])
def test_depth_codes_are_what_they_are_called_where_far_is_as_many_times_near(code, function):
    depth = np.linspace(3.0, 3.0 * target_codes.DEPTH_SPREAD, 101, dtype=np.float32)[None]
    image, (near, far) = target_codes.encode_depth(depth, code=code, quantiles=(0.0, 1.0))
    wanted = (function(depth) - function(near)) / (function(far) - function(near)) * 2.0 - 1.0
    np.testing.assert_allclose(image[0], wanted, atol=1e-5)
    units = np.linspace(0.0, 1.0, 101)
    slopes = np.gradient((image[0, 0] + 1) / 2, units)
    np.testing.assert_allclose(target_codes.depth_code_slope(units, code)[1:-1], slopes[1:-1], rtol=2e-3)


def test_depth_encoding_of_flat_and_empty_maps():
    image, constants = target_codes.encode_depth(np.full((4, 4), 2.0, np.float32))
    assert np.isfinite(image).all()
    assert constants == (2.0, 2.0)
    with pytest.raises(UserError, match="no valid pixel"):
        target_codes.encode_depth(np.zeros((4, 4), np.float32))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 1.0))
def test_flow_round_trip_loses_nothing_up_to_the_image_size(seed, share):
    limits = np.array([48.0, 32.0])[:, None, None] * share
    flow = (np.random.default_rng(seed).uniform(-1, 1, (2, 32, 48)) * limits).astype(np.float32)
    images = target_codes.encode_flow(flow)
    assert np.abs(images).max() <= 1.0
    assert target_codes.count_clipped_flow(flow) == 0
    for convert in (np.asarray, torch.from_numpy):
        decoded = [np.asarray(target_codes.decode_flow(convert(images[a]), a, (48, 32)[a])) for a in (0, 1)]
        np.testing.assert_allclose(np.stack(decoded), flow, atol=1e-4)


def test_flow_code_is_odd_and_counts_what_it_clips():
    flow = np.array([[[0.0, 3.0, -3.0, 5.0]], [[0.0, 0.5, -0.5, 0.0]]], np.float32)  # 4 x 1 pixels: u = 5 leaves the image
    images = target_codes.encode_flow(flow)
    assert images[0, 0, 0, 0] == 0.0
    assert images[0, 0, 0, 1] == -images[0, 0, 0, 2]
    assert target_codes.count_clipped_flow(flow) == 1
    assert target_codes.decode_flow(images[0], 0, 4)[0, 3] == pytest.approx(4.0)


def test_resize_flow_scales_u_with_width_and_v_with_height():
    flow = np.stack([np.full((6, 8), 4.0), np.full((6, 8), 3.0)]).astype(np.float32)
    for smooth in (True, False):
        resized = tasks.resize_flow(flow, (12, 4), smooth=smooth)
        assert resized.shape == (2, 12, 4)
        np.testing.assert_allclose(resized[0], 2.0)
        np.testing.assert_allclose(resized[1], 6.0)
    same = target_codes.encode_flow(tasks.resize_flow(flow, (12, 4)))  # the code commutes with resizing
    np.testing.assert_allclose(same[:, 0, 0, 0], target_codes.encode_flow(flow)[:, 0, 0, 0], rtol=1e-6)


def test_mirrored_flow_points_at_the_mirrored_pixel():
    flow = np.zeros((2, 1, 4), np.float32)
    flow[:, 0, 1] = (2.0, 5.0)
    mirrored = target_codes.mirror_flow(flow)
    assert tuple(mirrored[:, 0, 2]) == (-2.0, 5.0)
    assert (target_codes.mirror_flow(mirrored) == flow).all()


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_amodal_decode_is_the_grey_rule_on_8_bits(convert):
    image = np.random.default_rng(2).integers(240, 256, (16, 16, 3), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(image).convert("L"))
    assert (np.asarray(target_codes.decode_amodal(convert(tasks.image_to_float(image)))) == (grey <= 250)).mean() > 0.99
    mask = np.zeros((16, 16), bool)
    mask[4:9, 3:12] = True
    dark = np.full((16, 16, 3), 90, np.uint8)
    assert (np.asarray(target_codes.decode_amodal(convert(target_codes.encode_amodal(dark, mask)))) == mask).all()


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real samples")
def test_amodal_ceiling_on_real_samples():
    folder = SHARED / "pix2gestalt"
    scores = []
    for path in sorted((folder / "whole").glob("*.png")):
        whole = tasks.image_to_float(np.asarray(Image.open(path).convert("RGB")))
        name = path.name.replace("_whole.png", "_whole_mask.png")
        truth = np.asarray(Image.open(folder / "whole_mask" / name).convert("L")) > 127
        mask = target_codes.decode_amodal(whole)
        scores.append((mask & truth).sum() / (mask | truth).sum())
    assert len(scores) > 0
    assert np.mean(scores) > 0.9
