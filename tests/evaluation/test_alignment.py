import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt.evaluation.alignment import fit_affine


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(-5, 5), st.floats(-100, 100))
def test_exact_relations_are_found(seed, scale, shift):
    rng = np.random.default_rng(seed)
    prediction = rng.random((2, 3, 6, 7)).astype(np.float32)
    valid = rng.random((2, 3, 6, 7)) < 0.5
    valid[..., 0, :2] = True
    truth = np.where(valid, scale * prediction.astype(np.float64) + shift, 1e6)  # what is invalid must not matter
    found_scale, found_shift = fit_affine(prediction, truth, valid)
    assert found_scale.shape == (2, 3)
    np.testing.assert_allclose(found_scale, scale, atol=1e-8)
    np.testing.assert_allclose(found_shift, shift, atol=1e-8)


def test_equals_numpy_least_squares_far_from_zero():
    rng = np.random.default_rng(0)
    prediction = (1e4 + rng.random((20, 20))).astype(np.float32)
    truth = rng.random((20, 20)) + 0.3 * prediction
    valid = rng.random((20, 20)) < 0.7
    design = np.stack([prediction[valid].astype(np.float64) - 1e4, np.ones(valid.sum())], axis=1)
    (scale, shift), *_ = np.linalg.lstsq(design, truth[valid], rcond=None)
    found = fit_affine(prediction, truth, valid)
    assert found[0] == pytest.approx(scale, rel=1e-9)
    assert found[1] == pytest.approx(shift - scale * 1e4, rel=1e-9)


def test_constant_prediction_and_single_pixel():
    truth = np.array([[1.0, 3.0], [5.0, 100.0]])
    valid = np.array([[True, True], [True, False]])
    assert fit_affine(np.full((2, 2), 7.0, np.float32), truth, valid) == (0.0, 3.0)
    assert fit_affine(truth, truth, np.array([[False, True], [False, False]])) == (0.0, 3.0)
