"""How the experiment on rules judges the measured loss, by hand."""

import numpy as np
import pytest

import rules_vs_noise


def test_correlation_layer_by_layer() -> None:
    a = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    b = np.array([[10.0, 20.0, 30.0], [3.0, 2.0, 1.0]])
    assert rules_vs_noise.by_layer(a, b) == pytest.approx([1.0, -1.0])


def test_reliability_compares_even_and_odd_seeds() -> None:
    # One layer of four experts. Even seeds order them 1 2 3 4, odd ones 1 2 4 3: Spearman 1 - 6 * 2 / (4 * 15) = 0.8.
    even, odd = [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.4, 0.3]
    found = rules_vs_noise.reliability(np.array([even, odd, even, odd])[:, None])
    assert found["halves_per_layer"] == pytest.approx([0.8])
    assert found["halves_mean"] == pytest.approx(0.8)
    assert found["halves_overall"] == pytest.approx(0.8)
    assert found["most_mean"] == pytest.approx((2 * 0.8 / 1.8) ** 0.5)  # Spearman and Brown
    assert found["most_overall"] == pytest.approx((2 * 0.8 / 1.8) ** 0.5)


def test_halves_that_disagree_allow_nothing() -> None:
    up, down = [1.0, 2.0, 4.0, 3.0], [4.0, 3.0, 1.0, 2.5]
    assert rules_vs_noise.reliability(np.array([up, down])[:, None])["most_mean"] == 0
