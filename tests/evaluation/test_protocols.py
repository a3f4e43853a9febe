import numpy as np
import pytest

from dpt.errors import UserError
from dpt.evaluation import protocols
from dpt.evaluation.protocols import PROTOCOLS, average, counted_pixels, find_protocol, score


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


def test_every_protocol_is_complete():
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert protocol.main_metric in {"depth": ("abs_rel",), "flow": ("epe",), "amodal": ("iou",)}[protocol.task]
        assert protocol.clip[0] > 0


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
    metres = protocols.align_depth_to_truth(
        PROTOCOLS["scannet"], prediction * 1.0, truth, np.array([[True, True, True, False]])
    )
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
    reduced = score(PROTOCOLS["eth3d"], prediction, truth)
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
