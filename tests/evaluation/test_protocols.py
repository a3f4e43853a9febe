import dataclasses

import numpy as np
import pytest

from dpt.errors import UserError
from dpt.evaluation import protocols
from dpt.evaluation.protocols import PROTOCOLS, average, counted_pixels, find_protocol, score

COLUMN = {"abs_rel_log_fit", "delta1_log_fit"}


def test_protocols_are_found_by_data_set():
    assert find_protocol("NYU-v2", "depth").name == "nyu_v2"
    assert find_protocol("FlyingChairs", "flow").name == "flying_chairs"
    assert find_protocol("synthetic", "amodal").name == "synthetic_amodal"
    assert find_protocol("anything", "depth", name="kitti").name == "kitti"
    for arguments, words in (
        ({"dataset": "cityscapes", "task": "depth"}, "no depth protocol"),
        ({"dataset": "x", "task": "depth", "name": "nyu"}, "unknown"),
        ({"dataset": "x", "task": "flow", "name": "kitti"}, "is for depth"),
    ):
        with pytest.raises(UserError, match=words):
            find_protocol(**arguments)


def test_crops_are_the_published_pixels():
    truth = np.full((480, 640), 5.0)
    rows, cols = np.where(counted_pixels(PROTOCOLS["nyu_v2"], truth))
    assert (rows.min(), rows.max() + 1, cols.min(), cols.max() + 1) == (45, 471, 41, 601)
    rows, cols = np.where(counted_pixels(PROTOCOLS["kitti"], np.full((352, 1216), 5.0)))
    assert (rows.min(), rows.max() + 1, cols.min(), cols.max() + 1) == (117, 321, 43, 1172)
    rows, cols = np.where(counted_pixels(PROTOCOLS["kitti"], np.full((375, 1242), 5.0)))  # the same part of the whole image
    assert (rows.min(), rows.max() + 1, cols.min(), cols.max() + 1) == (117 + 23, 321 + 23, 43 + 13, 1172 + 13)


def test_valid_ranges_are_open_intervals():
    truth = np.array([[0.0, 1e-3, 0.5, 9.99, 10.0, np.inf, np.nan]])
    assert counted_pixels(PROTOCOLS["scannet"], truth).tolist() == [[False, False, True, True, False, False, False]]
    assert counted_pixels(PROTOCOLS["eth3d"], truth)[0, 4]


def test_affine_copies_of_the_truth_are_perfect():
    truth = np.random.default_rng(0).uniform(1, 9, (30, 40)).astype(np.float32)
    truth[:3] = 0
    found = score(PROTOCOLS["scannet"], 0.1 * truth - 0.05, truth)
    assert found["abs_rel"] == pytest.approx(0.0, abs=1e-6)
    assert found["delta1"] == 1.0


def test_aligned_depth_is_clipped_to_the_range():
    truth = np.array([[1.0, 2.0, 3.0, 9.5]])
    prediction = np.array([[0.0, 0.0, 0.0, 1.0]])
    metres = protocols.align_depth_to_truth(PROTOCOLS["scannet"], prediction, truth, np.array([[True, True, True, False]]))
    assert metres.tolist() == [[2.0, 2.0, 2.0, 2.0]]  # a constant where it was fitted
    steep = protocols.align_depth_to_truth(
        PROTOCOLS["diode"], np.array([[0.0, 1.0, 1000.0, -5.0]]), truth, np.array([[True, True, False, False]])
    )
    assert steep.tolist() == [[1.0, 2.0, 350.0, 0.6]]


def test_large_maps_are_aligned_on_a_reduced_size():
    rng = np.random.default_rng(0)
    truth = rng.uniform(1, 5, (40, 2100))
    prediction = truth + rng.normal(0, 0.3, truth.shape)
    full = score(PROTOCOLS["scannet"], prediction, truth)
    reduced = score(dataclasses.replace(PROTOCOLS["eth3d"], log_fit=protocols.LogFit()), prediction, truth)
    assert full["abs_rel"] != reduced["abs_rel"]
    assert full["abs_rel"] == pytest.approx(reduced["abs_rel"], rel=0.02)


def test_flow_is_scored_with_and_without_fit():
    truth = np.random.default_rng(0).normal(0, 5, (2, 8, 9))
    prediction = truth * np.array([2.0, 0.5])[:, None, None] + np.array([1.0, -3.0])[:, None, None]
    found = score(PROTOCOLS["flying_chairs"], prediction, truth)
    assert found["epe"] > 1
    assert found["epe_fit"] == pytest.approx(0.0, abs=1e-9)
    assert found["outliers_fit"] == 0.0


def test_means_and_pooled_iou():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[:2], b[:4] = True, True
    rows = [score(PROTOCOLS["coco_a"], a, b), score(PROTOCOLS["coco_a"], a[:1], a[:1])]
    found = average([*rows, {}])
    assert found == {"iou": pytest.approx(0.75), "iou_pooled": pytest.approx((8 + 4) / (16 + 4))}
    assert average([{}]) == {}


def test_what_cannot_be_scored():
    truth = np.ones((4, 4))
    assert score(PROTOCOLS["scannet"], truth, np.zeros((4, 4))) == {}
    with pytest.raises(UserError, match="shape"):
        score(PROTOCOLS["scannet"], np.ones((2, 2)), truth)
    with pytest.raises(UserError, match="finite"):
        score(PROTOCOLS["scannet"], np.full((4, 4), np.nan), truth)


def test_the_second_column_of_depth_is_blind_to_scale_and_shift_and_to_outliers():
    truth = np.random.default_rng(0).uniform(1, 9, (60, 80)).astype(np.float32)
    prediction = 0.1 * truth - 0.05
    prediction[:20] = np.random.default_rng(1).uniform(0, 1, (20, 80))  # a third of the picture
    found = score(PROTOCOLS["scannet"], prediction, truth)
    wrong = np.abs(np.clip((prediction[:20] + 0.05) * 10, 1e-3, truth.max()) / truth[:20] - 1).sum() / truth.size
    assert found["abs_rel_log_fit"] == pytest.approx(wrong, rel=0.05)
    assert found["abs_rel_log_fit"] < 0.8 * found["abs_rel"]
    assert found["delta1_log_fit"] > found["delta1"]


def test_the_second_column_counts_the_rivals_pixels_at_its_size():
    truth = np.full((60, 80), 2.0, np.float32)
    truth[:, 40:] = 3.0
    prediction = truth.copy()
    prediction[30:] = 9.0  # wrong below, but for where nothing counts
    fitted = {}
    for name, protocol in PROTOCOLS.items():
        if protocol.task == "depth":
            near = np.where(np.arange(60)[:, None] < 30, truth, 0.05).astype(np.float32)
            fitted[name] = score(dataclasses.replace(protocol, crop=None), prediction, near)
    assert fitted["nyu_v2"]["abs_rel_log_fit"] == pytest.approx(0, abs=1e-6)  # 0.05 m is below the rival's 0.1 m
    assert fitted["kitti"]["delta1_log_fit"] == 1.0
    assert fitted["diode"]["abs_rel_log_fit"] == pytest.approx(0, abs=1e-6)
    assert fitted["scannet"]["delta1_log_fit"] < 0.7
    assert score(PROTOCOLS["nyu_v2"], prediction, np.full((60, 80), 0.05, np.float32)).keys().isdisjoint(COLUMN)
    log_fit = protocols.LogFit(size=(30, 40), steepest=0.3)
    steep = dataclasses.replace(PROTOCOLS["scannet"], log_fit=log_fit)
    edge = np.where(np.isin(np.arange(80), (38, 39, 40, 41)), 9.0, truth).astype(np.float32)  # wrong at the step alone
    assert score(steep, edge, truth)["abs_rel_log_fit"] == pytest.approx(0, abs=1e-6)
    assert score(PROTOCOLS["scannet"], edge, truth)["abs_rel_log_fit"] > 0.01


def test_a_constant_has_a_second_column_and_means_take_the_images_that_have_one():
    truth = np.linspace(1.0, 4.0, 200).reshape(10, 20)
    found = score(PROTOCOLS["scannet"], np.zeros((10, 20)), truth)
    assert found["abs_rel_log_fit"] == pytest.approx(np.mean(np.abs(np.median(truth) / truth - 1)), rel=1e-3)
    without = {name: value for name, value in found.items() if name not in COLUMN}
    assert average([without, found])["abs_rel_log_fit"] == found["abs_rel_log_fit"]
