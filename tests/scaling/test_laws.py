"""Laws are recovered from points made with them, noise and offset included; what cannot carry a fit is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull
from scipy.stats import linregress

from dpt.errors import UserError
from dpt.scaling import paper
from dpt.scaling.laws import Law, fit_power_law, frontier

X = np.logspace(15, 19, 8)


@pytest.mark.parametrize(("name", "law"), paper.LAWS.items())
def test_the_papers_coefficients_are_recovered(name, law):
    a, b = law
    x = np.logspace(10, 13, 8) if "over" in name else X
    fit = fit_power_law(x, a * x**b)
    assert (fit.law.a, fit.law.b) == pytest.approx((a, b), rel=1e-9)
    assert fit.r2 == pytest.approx(1.0)
    assert fit.holdout_error == pytest.approx(0.0, abs=1e-9)


def test_the_equation_reads_as_in_the_paper():
    assert Law(a=0.23, b=-0.0098).equation() == "L(C) = 0.23 × C^-0.0098"
    assert Law(a=123456.0, b=-0.5, c=0.02).equation() == "L(C) = 1.23e+05 × C^-0.5 + 0.02"


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-2, 1e3), st.floats(-0.9, -0.02), st.integers(0, 1000))
def test_the_plain_fit_is_least_squares_in_log_space(a, b, seed):
    y = a * X**b * np.exp(0.003 * np.random.default_rng(seed).normal(size=len(X)))
    reference = linregress(np.log(X), np.log(y))
    fit = fit_power_law(X, y, samples=50)
    assert fit.law.b == pytest.approx(reference.slope, rel=1e-6, abs=1e-12)
    assert np.log(fit.law.a) == pytest.approx(reference.intercept, rel=1e-6, abs=1e-9)
    assert fit.r2 == pytest.approx(reference.rvalue**2, abs=1e-6)


@settings(max_examples=12, deadline=None)
@given(st.floats(0.5, 20.0), st.floats(-0.6, -0.15), st.floats(0.05, 0.6))
def test_an_offset_is_recovered(a, b, share):
    x = np.logspace(0, 5, 12)
    c = share * a * x[-1] ** b / (1 - share)  # this share of the last value
    fit = fit_power_law(x, a * x**b + c, offset=True, samples=50)
    assert fit.law(x) == pytest.approx(a * x**b + c, rel=1e-3)
    assert fit.law.b == pytest.approx(b, rel=0.05)


def test_a_law_with_noise_lies_in_its_interval_as_often_as_it_says():
    rng = np.random.default_rng(1)
    inside, misses = 0, []
    for trial in range(200):
        y = 30 * X[:5] ** -0.1 * np.exp(0.01 * rng.normal(size=5))
        fit = fit_power_law(X[:5], y, samples=400, seed=trial)
        inside += fit.interval_b[0] <= -0.1 <= fit.interval_b[1]
        misses.append(fit.law.b + 0.1)
    assert 0.88 <= inside / 200 <= 1.0
    assert abs(np.mean(misses)) < 5e-4


def test_predictions_carry_their_interval():
    y = 2 * X**-0.2 * np.exp(0.01 * np.random.default_rng(0).normal(size=len(X)))
    fit = fit_power_law(X, y)
    value, low, high = fit.predict([1e17, 1e21])
    assert (low < value).all()
    assert (value < high).all()
    assert (high / low)[1] > (high / low)[0]
    assert "held-out error" in fit.sentence()


@pytest.mark.parametrize(
    ("x", "y", "offset", "words"),
    [
        ([1, 10], [1, 0.5], False, "2 different x cannot carry"),
        ([1, 10, 100], [1, 0.5, 0.3], True, "at least 4"),
        ([1, 10, 10, 1], [1, 0.5, 0.5, 1], False, "2 different x"),
        ([1, 1.2, 1.5], [1, 0.9, 0.8], False, "factor of 1.5"),
        ([1, 10, 100], [1, 0.5, 0.0], False, "above 0"),
        ([1, 10, np.nan], [1, 0.5, 0.1], False, "finite"),
        ([1, 10, 100, 1000], [1, 0.5, 1, 0.5], False, "no power law"),
        ([1, 10], [1], False, "as many"),
    ],
)
def test_points_that_cannot_carry_a_fit_are_refused(x, y, offset, words):
    with pytest.raises(UserError, match=words) as refusal:
        fit_power_law(x, y, offset=offset)
    assert "\n" not in str(refusal.value)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=3, max_size=30, unique_by=lambda p: p[0]))
def test_the_frontier_is_the_falling_part_of_the_lower_hull(points):
    x, y = np.array(points, dtype=float).T
    chosen = frontier(x, y)
    u, v = np.log(x), np.log(y)
    assert (np.diff(u[chosen]) > 0).all()
    assert (np.diff(v[chosen]) < 0).all()
    slopes = np.diff(v[chosen]) / np.diff(u[chosen])
    assert (np.diff(slopes) > 0).all()
    line = np.interp(u, u[chosen], v[chosen])
    assert (v >= line - 1e-9).all()
    try:
        hull = set(ConvexHull(np.stack([u, v], axis=1)).vertices)
    except Exception:
        return  # all points on one line
    assert set(chosen[:-1]) <= hull | set(chosen[-1:])


def _curves_of_runs(rng):
    """Five runs of forty points each on one law, every run off by a factor of its own."""
    x = np.concatenate([np.geomspace(10.0**n, 10.0 ** (n + 1.5), 40) for n in range(16, 21)])
    runs = np.repeat([f"run{n}" for n in range(5)], 40)
    off = np.repeat(rng.normal(scale=0.1, size=5), 40)
    return x, 2 * x**-0.1 * np.exp(off), runs.tolist()


def test_points_of_one_run_count_as_one_witness():
    """The exponent lies in the interval as often as it says; counted as independent, points are sure of what is chance."""
    covered = {True: 0, False: 0}
    for seed in range(20):
        x, y, runs = _curves_of_runs(np.random.default_rng(seed))
        for by_run in covered:
            try:
                low, high = fit_power_law(x, y, runs=runs if by_run else (), samples=200).interval_b
            except UserError:  # the interval holds 0, and so the exponent
                low, high = -1.0, 0.0
            covered[by_run] += low <= -0.1 <= high
    assert covered[True] >= 18
    assert covered[False] <= 16


def test_the_frontier_is_chosen_anew_in_each_draw():
    x, y, runs = _curves_of_runs(np.random.default_rng(1))
    fit = fit_power_law(x, y, runs=runs, on_frontier=True, samples=200)
    assert len(fit.x) == len(frontier(x, y)) < len(x)
    fixed = fit_power_law(fit.x, fit.y, samples=200)
    assert not np.allclose(fit.interval_b, fixed.interval_b, rtol=0.05)
    assert fit.interval_b[0] <= -0.1 <= fit.interval_b[1]
    with pytest.raises(UserError, match="5 points, but 2"):
        fit_power_law(X[:5], X[:5] ** -0.1, runs=["a", "b"])
