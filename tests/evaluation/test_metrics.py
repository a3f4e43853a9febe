import numpy as np
import pytest
import torch
from torchmetrics.functional import mean_squared_error
from torchmetrics.functional.classification import binary_jaccard_index
from torchmetrics.functional.regression import mean_absolute_percentage_error

from dpt.evaluation.metrics import depth_metrics, flow_metrics, mask_metrics


def test_depth_by_hand():
    prediction, truth = np.array([1.0, 3.0, 4.0, 2.0]), np.array([1.0, 2.0, 5.0, 1.0])
    found = depth_metrics(prediction, truth)
    assert found["abs_rel"] == pytest.approx((0 + 1 / 2 + 1 / 5 + 1) / 4)
    assert found["sq_rel"] == pytest.approx((0 + 1 / 2 + 1 / 5 + 1) / 4)
    assert found["rmse"] == pytest.approx(np.sqrt(3 / 4))
    assert found["log10"] == pytest.approx((np.log10(1.5) + np.log10(1.25) + np.log10(2)) / 4)
    assert found["delta1"] == 0.25  # 1.25 itself is not below 1.25
    assert found["delta2"] == 0.75  # 1.5 and 1.25 are below 1.5625
    assert found["delta3"] == 0.75
    logs = np.log([1.0, 1.5, 0.8, 2.0])
    assert found["si_log"] == pytest.approx(100 * np.sqrt(np.mean(logs**2) - np.mean(logs) ** 2))


def test_depth_against_torchmetrics():
    rng = np.random.default_rng(0)
    truth, prediction = rng.uniform(0.5, 9, 1000), rng.uniform(0.5, 9, 1000)
    found = depth_metrics(prediction.astype(np.float32), truth.astype(np.float32))
    p, g = torch.from_numpy(prediction), torch.from_numpy(truth)
    assert found["abs_rel"] == pytest.approx(mean_absolute_percentage_error(p, g).item(), rel=1e-5)
    assert found["rmse"] == pytest.approx(mean_squared_error(p, g, squared=False).item(), rel=1e-5)
    rmse_log = mean_squared_error(p.log(), g.log(), squared=False).item()
    assert found["si_log"] == pytest.approx(100 * np.sqrt(rmse_log**2 - np.mean(np.log(prediction / truth)) ** 2), rel=1e-4)


def test_scaled_depth_has_no_scale_invariant_error():
    truth = np.random.default_rng(1).uniform(1, 5, 50)
    found = depth_metrics(2 * truth, truth)
    assert found["si_log"] == pytest.approx(0.0, abs=1e-6)
    assert found["abs_rel"] == pytest.approx(1.0)


def test_flow_by_hand():
    truth = np.array([[0.0, 100.0, 3.0, 0.0], [0.0, 0.0, 4.0, 0.0]])
    prediction = truth + np.array([[3.0, 4.0, 0.0, 0.0], [4.0, 0.0, 0.0, 2.0]])
    found = flow_metrics(prediction, truth)
    assert found["epe"] == pytest.approx((5 + 4 + 0 + 2) / 4)
    assert found["outliers"] == 0.25  # 5 px without motion; 4 px of 100 is under 5%; 2 px is under 3


def test_masks_by_hand_and_against_torchmetrics():
    prediction, truth = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert mask_metrics(prediction, truth) == {"iou": 1 / 3, "intersection": 1.0, "union": 3.0}
    assert mask_metrics(np.zeros(3, bool), np.zeros(3, bool))["iou"] == 1.0
    rng = np.random.default_rng(2)
    a, b = rng.random(500) < 0.4, rng.random(500) < 0.6
    expected = binary_jaccard_index(torch.from_numpy(a).int(), torch.from_numpy(b).int()).item()
    assert mask_metrics(a, b)["iou"] == pytest.approx(expected, rel=1e-6)
