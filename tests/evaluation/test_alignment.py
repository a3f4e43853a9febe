import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import RANSACRegressor

from dpt.evaluation.alignment import fit_affine, fit_affine_log

TIGHT = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}


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


def _log_error(fit, p, g):
    depth = fit[0] * p + fit[1]
    return np.inf if depth.min() <= 0 else float(np.square(np.log(depth) - np.log(g)).sum())


@pytest.mark.parametrize("seed", range(4))
def test_the_fit_in_log_depth_is_least_squares_over_the_most_pixels(seed):
    """Against scipy's minimum over the inliers, and against the truth that the outliers hide."""
    rng = np.random.default_rng(seed)
    g = np.exp(rng.uniform(0, 1.5, 4000))
    p = (g - 2.0) / 7.0 * np.exp(rng.normal(0, 0.02, g.size))
    p[:600] = rng.uniform(p.min(), p.max(), 600)  # wrong by far more than the tolerance, most of them
    scale, shift = fit_affine_log(p, g)
    tolerance = np.median(np.abs(np.log(g) - np.median(np.log(g))))
    inside = np.abs(np.log(np.maximum(scale * p + shift, 1e-9)) - np.log(g)) <= tolerance
    assert inside[600:].all()
    wanted = minimize(lambda fit: _log_error(fit, p[inside], g[inside]), [7.0, 2.0], method="Nelder-Mead", options=TIGHT).x
    assert (scale, shift) == pytest.approx(tuple(wanted), rel=2e-3)
    assert (scale, shift) == pytest.approx((7.0, 2.0), rel=0.05)
    plain = fit_affine(p[None], g[None], np.ones((1, g.size), bool))
    assert abs(plain[0] - 7.0) > 2 * abs(scale - 7.0)  # least squares over all is led astray


def test_the_fit_in_log_depth_has_the_inliers_of_scikit_learn():
    """Where a prediction is wrong by a factor alone the line in log depth (scikit-learn's, as the rival's code has it) and the
    fit through the logarithm are the same up to the fit's second number."""
    rng = np.random.default_rng(5)
    g = np.exp(rng.uniform(0, 1.5, 3000))
    p = g / 3.0
    p[:500] = rng.uniform(0.2, 2.0, 500)
    line = RANSACRegressor(max_trials=1000, random_state=42).fit(np.log(p)[:, None], np.log(g))
    scale, shift = fit_affine_log(p, g)
    assert (scale, shift) == pytest.approx((3.0, 0.0), abs=0.1)
    theirs = np.exp(line.predict(np.log(p)[:, None]))
    assert np.abs((scale * p + shift) / theirs - 1)[500:].max() < 0.05


def test_the_fit_in_log_depth_of_what_cannot_be_fitted():
    g = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    assert fit_affine_log(np.full(5, 3.0), g) == (0.0, pytest.approx(4.0))
    assert fit_affine_log(-g, g) == (0.0, pytest.approx(4.0))
    assert fit_affine_log(g, np.full(5, 2.0)) == (0.0, pytest.approx(2.0))
    assert fit_affine_log(2 * g - 1, g) == pytest.approx((0.5, 0.5))
