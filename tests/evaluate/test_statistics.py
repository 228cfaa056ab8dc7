"""Statistics against scipy's own intervals and against formulas written out."""

import math

import numpy as np
import pytest
from scipy import stats

from hetmoe.errors import InputError
from hetmoe.evaluate.statistics import mean_interval, paired_difference, spearman

RANDOM = np.random.default_rng(5)


@pytest.mark.parametrize("count", [2, 3, 8, 40])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_mean_interval_is_scipys(count: int, confidence: float) -> None:
    values = RANDOM.normal(30, 4, count)
    found = mean_interval(values, confidence)
    test = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    np.testing.assert_allclose([found.low, found.high], [test.low, test.high], rtol=1e-12)
    np.testing.assert_allclose([found.mean, found.standard_error], [values.mean(), stats.sem(values)], rtol=1e-12)
    assert found.count == count


def test_a_known_interval() -> None:
    """Three values: t of 2 degrees of freedom is 4.302653 at 95 %, the sample variance 13."""
    found = mean_interval([10, 12, 17])
    assert found.high - found.mean == pytest.approx(4.302652729911275 * math.sqrt(13 / 3))


@pytest.mark.parametrize("count", [2, 7])
def test_paired_difference_is_scipys_paired_test(count: int) -> None:
    a = RANDOM.normal(30, 4, count)
    b = a + RANDOM.normal(0.3, 0.1, count)
    found = paired_difference(a, b)
    test = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], [test.low, test.high], rtol=1e-10)
    # The spread that both share is gone: far narrower than what two separate means would allow.
    assert found.standard_error < 0.2 * mean_interval(a).standard_error


def test_paired_difference_of_equal_values_is_zero() -> None:
    found = paired_difference([1.0, 2.0], [1.0, 2.0])
    assert (found.mean, found.low, found.high, found.standard_error) == (0, 0, 0, 0)


def test_huge_values_do_not_overflow() -> None:
    found = mean_interval([1e304, 3e304])
    assert found.mean == pytest.approx(2e304) and found.standard_error == pytest.approx(1e304)


def test_spearman_by_hand_with_ties() -> None:
    a, b = [1.0, 2.0, 2.0, 5.0, 0.0], [10.0, 30.0, 20.0, 20.0, -1.0]
    ranks_a, ranks_b = np.array([2, 3.5, 3.5, 5, 1]), np.array([2, 5, 3.5, 3.5, 1])
    assert spearman(a, b) == pytest.approx(np.corrcoef(ranks_a, ranks_b)[0, 1])
    assert spearman(a, np.exp(a)) == pytest.approx(1) and spearman(a, -np.array(a)) == pytest.approx(-1)


@pytest.mark.parametrize("function", [paired_difference, spearman])
def test_values_that_cannot_be_paired(function) -> None:
    with pytest.raises(InputError, match="3 and 2 values cannot be paired"):
        function([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(InputError, match="b: nan at 1"):
        function([1.0, 2.0], [1.0, math.nan])
    with pytest.raises(InputError, match="at least two values"):
        function([1.0], [2.0])


def test_bad_values() -> None:
    for values, message in (
        ([], "at least two values"),
        ([3.0], "at least two values"),
        ([[1.0, 2.0]], r"shape \[1, 2\]"),
        ([1.0, math.nan], "nan at 1"),
        ([math.inf, 1.0], "inf at 0"),
    ):
        with pytest.raises(InputError, match=message):
            mean_interval(values)
    for confidence in (0.0, 1.0, math.nan, -1, 95):
        with pytest.raises(InputError, match="must be between 0 and 1"):
            mean_interval([1.0, 2.0], confidence)
    with pytest.raises(InputError, match="b: all values are 2"):
        spearman([1.0, 3.0], [2.0, 2.0])
