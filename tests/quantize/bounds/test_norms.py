"""Norms, slopes and directions: never below what they bound, and not far above."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.special import expit

from hetmoe.quantize.bounds.matrix_norms import column_norms, spectral_norm, stacked_spectral_norms
from hetmoe.quantize.bounds.rms_norm import norm_change, rms_norm
from hetmoe.quantize.bounds.silu import LOWEST, STEEPEST, TURN, silu, steepest_within

SIZES = st.sampled_from([1e-30, 1e-3, 1.0, 1e30])


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), SIZES, st.sampled_from([1, 2, 12]))
def test_spectral_norm_is_the_largest_singular_value_from_above(seed, rows, columns, size, rank):
    rng = np.random.default_rng(seed)
    w = size * rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    exact = np.linalg.norm(w, 2)  # itself within about 1e-15
    assert exact * (1 - 1e-13) <= spectral_norm(w) <= exact * (1 + 1e-6)
    (stacked,) = stacked_spectral_norms(w[None])
    assert exact * (1 - 1e-13) <= stacked <= exact * min(rows, columns) ** 0.125 * (1 + 1e-6)
    lengths = [np.sqrt(sum(value**2 for value in column)) for column in w.T]
    np.testing.assert_allclose(column_norms(w), lengths, rtol=1e-8)
    assert (column_norms(w) >= lengths).all()


def test_norms_of_nothing_are_nothing():
    assert spectral_norm(np.zeros((3, 4))) == 0 and stacked_spectral_norms(np.zeros((2, 3, 4))).tolist() == [0, 0]


def test_the_slopes_extrema_are_where_the_docstring_says():
    # With z = 2.39936 +- 1e-4 around the root of z tanh(z / 2) = 2, found by bisection here.
    low, high = 2.0, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * np.tanh(middle / 2) < 2 else (low, middle)
    top = expit(low) * (1 + low * (1 - expit(low)))
    assert abs(low - TURN) < 1e-7 and 0 < STEEPEST - top < 1e-6 and 0 < (1 - top) - LOWEST < 1e-6


@settings(max_examples=200)
@given(st.floats(-800, 800), st.sampled_from([0.0, 1e-9, 0.01, 1.0, 3.0, 50.0, 1e4]), st.integers(0, 2**32 - 1))
def test_no_slope_within_the_range_is_steeper(z, radius, seed):
    """The chord to a point of the range is no steeper than the bound, which some tangent comes near."""
    limit = steepest_within(np.array([z]), np.array([radius]))[0]
    points = z + radius * np.r_[-1, 1, np.random.default_rng(seed).uniform(-1, 1, 200)]
    points = np.r_[points, [t for t in (TURN, -TURN) if abs(t - z) <= radius]]
    s = expit(points)
    tangents = np.abs(s * (1 + points * (1 - s)))
    assert tangents.max() <= limit <= tangents.max() + 1e-5
    assert (np.abs(silu(points) - silu(np.array(z))) <= limit * np.abs(points - z) + 1e-12).all()


@settings(max_examples=100)
@given(
    st.integers(0, 2**32 - 1), st.integers(2, 30), st.sampled_from([1e-12, 1e-4, 1.0, 1e6]),
    st.sampled_from([0.0, 1e-6, 0.1, 0.9, 1.0, 3.0, 1e3]), st.sampled_from([1e-5, 1e-2]),
)  # fmt: skip
def test_normed_vectors_move_by_less(seed, width, size, ratio, eps):
    rng = np.random.default_rng(seed)
    x = size * rng.standard_normal(width)
    radius = ratio * np.linalg.norm(x)
    (bound,) = norm_change(x[None], np.array([radius]), eps)
    directions = rng.standard_normal((50, width))
    directions = np.r_[directions, [-x, x]]
    for y in x + radius * directions / np.linalg.norm(directions, axis=1, keepdims=True):
        assert np.linalg.norm(rms_norm(y, eps) - rms_norm(x, eps)) <= bound


@pytest.mark.parametrize("ratio", [1e-3, 0.3, 0.9])
def test_the_tangent_reaches_the_bound(ratio):
    x = np.array([3.0, 4.0, 0.0])
    # The farthest direction within the ball: the tangent at an angle of arcsin(ratio), cos times as long.
    angle = np.arcsin(ratio)
    y = 5 * np.cos(angle) * (np.cos(angle) * x / 5 + np.sin(angle) * np.array([0, 0, 1]))
    assert np.linalg.norm(y - x) == pytest.approx(5 * ratio)
    moved = np.linalg.norm(rms_norm(y, 1e-12) - rms_norm(x, 1e-12))
    assert moved == pytest.approx(norm_change(x[None], np.array([5 * ratio]), 1e-12)[0], rel=1e-6)
