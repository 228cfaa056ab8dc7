"""Intervals, slopes, correlations and verdicts."""

import numpy as np
import pytest
from scipy import stats

from hetmoe.errors import InputError
from theory.claims import CONDITIONS, FAILS, HOLDS, NOT_DERIVED, UNDECIDED, Claim, Criterion, Finding
from theory.statistics import (
    Estimate,
    by_seed,
    log_of_mean,
    mean,
    median,
    rank_correlations,
    ratio_of_means,
    share,
    slope_on,
)  # fmt: skip


def estimate(low: float, high: float) -> Estimate:
    return Estimate(value=(low + high) / 2, low=low, high=high, runs=9)


def test_shares() -> None:
    found = share(np.array([True] * 7 + [False] * 3))
    wanted = stats.binomtest(7, 10).proportion_ci(0.95, method="wilson")
    assert (found.value, found.low, found.high, found.runs) == (0.7, wanted.low, wanted.high, 10)
    with pytest.raises(InputError, match="no runs"):
        share(np.array([], bool))


def test_intervals_cover_what_they_should() -> None:
    """Of 200 samples of 20 seeds, with frequencies that have their seed in common; percentiles cover a little less."""
    covered = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        values = rng.normal(size=(1, 20)) + 0.3 * rng.normal(size=(4, 20)) + 1.0
        found = by_seed(values, mean)
        assert found is not None and found.runs == 80 and found.low < found.value < found.high
        covered += found.low <= 1.0 <= found.high
    assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / 200) - 0.03 < covered / 200 <= 1.0


def test_intervals_are_of_95_percent() -> None:
    """Of the mean of many seeds: 1.96 standard errors to either side, within what 2000 resamples tell of a quantile."""
    values = np.random.default_rng(0).normal(size=(1, 400))
    found = by_seed(values, mean)
    assert found is not None
    error = values.std() / np.sqrt(400)
    np.testing.assert_allclose(
        [found.low, found.high], found.value + 1.96 * error * np.array([-1, 1]), atol=0.15 * error
    )


def test_statistics_are_of_each_resample() -> None:
    """Stacked arrays give what each gives alone."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(20, 4, 7))
    values[rng.random(values.shape) < 0.2] = np.nan
    values[rng.random(values.shape) < 0.1] = np.inf
    x = np.log([1.0, 2.0, 4.0, 8.0])
    for statistic in (mean, median, log_of_mean, slope_on(x), slope_on(x, median)):
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(statistic(values), [statistic(one) for one in values])
    pairs = np.stack([values, values**2], axis=-1)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(ratio_of_means(pairs), [ratio_of_means(one) for one in pairs])


def test_medians_count_infinite_values() -> None:
    values = np.array([[1.0, np.inf, 3.0, np.nan, -np.inf, 2.0, 4.0]])
    assert median(values) == 2.5 and np.isnan(median(values * np.nan))
    assert np.isinf(median(np.array([[1.0, np.inf, np.inf]]))) and np.isnan(median(np.array([[-np.inf, np.inf]])))
    assert by_seed(np.array([[1.0, np.inf, np.inf]]), median) is None
    x, rows = np.log([1.0, 2.0, 4.0]), np.array([[1.0, 2.0, 3.0], [2.0, 3.0, np.inf], [-np.inf, 4.0, 5.0]])
    assert slope_on(x, median)(rows) == pytest.approx(np.polyfit(x, [2.0, 3.0, 4.0], 1)[0])
    assert slope_on(x, log_of_mean)(np.array([[-1.0, 2.0, 2.0], [2.0] * 3, [4.0] * 3])) == pytest.approx(1.0)
    assert np.isnan(log_of_mean(np.array([[-1.0, 0.5]])))


def test_seeds_are_resampled_with_all_their_frequencies() -> None:
    """What seeds have in common does not average out over frequencies: intervals do not shrink with their number."""
    seeds = np.random.default_rng(0).normal(size=(1, 24))
    one, many = by_seed(seeds, mean), by_seed(np.repeat(seeds, 50, axis=0), mean)
    assert one is not None and many is not None
    assert (many.high - many.low) / (one.high - one.low) > 0.99


def test_slopes() -> None:
    x = np.log([1.0, 2.0, 4.0, 8.0])
    values = 3.0 - 0.7 * x[:, None] + np.zeros((4, 6))
    assert slope_on(x)(values) == pytest.approx(-0.7)
    values[1, :3], values[3, :4] = np.nan, np.nan  # three are enough, two are not
    values[3, 4:] = 100
    assert slope_on(x)(values) == pytest.approx(-0.7)
    values[0, :5] = np.nan
    assert np.isnan(slope_on(x)(values))
    noisy = values * 0 + np.random.default_rng(0).normal(size=(4, 6))
    noisy[np.isnan(noisy)] = 0
    assert slope_on(x)(noisy) == pytest.approx(stats.linregress(x, noisy.mean(axis=1)).slope)


def test_values_that_are_missing() -> None:
    values = np.array([[1.0, np.nan, 3.0], [np.nan] * 3])
    assert mean(values) == 2.0 and np.isnan(mean(values * np.nan))
    assert by_seed(values * np.nan, mean) is None
    rare = np.full((1, 8), np.nan)
    rare[0, 0] = 1.0
    assert by_seed(rare, mean) is None  # a third of the resamples has no value
    pairs = np.array([[[1.0, 2.0], [np.nan, 9.0], [5.0, 4.0]]])
    assert ratio_of_means(pairs) == 1.0 and np.isnan(ratio_of_means(pairs * np.nan))


def test_rank_correlations() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 4, (20, 8)).astype(float), rng.normal(size=(20, 8))
    wanted = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(rank_correlations(a, b), wanted, rtol=1e-12)
    assert np.isnan(rank_correlations(np.ones((1, 8)), b[:1])).all()


@pytest.mark.parametrize(
    ("criterion", "met", "refuted", "neither"),
    [
        (Criterion(1.0), [(1.1, 2)], [(0, 0.9)], [(0.9, 1.1)]),
        (Criterion(0.9, 1.1), [(0.95, 1.05)], [(0.2, 0.8), (1.2, 3)], [(0.5, 1.5), (0.95, 1.2)]),
    ],
)
def test_criteria(criterion, met, refuted, neither) -> None:
    assert all(criterion.met(estimate(*one)) and not criterion.refuted(estimate(*one)) for one in met)
    assert all(criterion.refuted(estimate(*one)) and not criterion.met(estimate(*one)) for one in refuted)
    assert not any(criterion.met(estimate(*one)) or criterion.refuted(estimate(*one)) for one in neither)


GOOD, BAD, WIDE = estimate(2, 3), estimate(-2, -1), estimate(-1, 3)


@pytest.mark.parametrize(
    ("cells", "verdict", "conditions"),
    [
        ({("a", "x"): GOOD, ("b", "x"): GOOD}, HOLDS, []),
        ({("a", "x"): BAD, ("b", "x"): WIDE}, FAILS, []),
        ({("a", "x"): WIDE, ("b", "x"): None}, UNDECIDED, []),
        ({("a", "x"): GOOD, ("b", "x"): GOOD, ("a", "y"): BAD, ("b", "y"): GOOD}, CONDITIONS, ["x", "y (b)"]),
        ({("a", "x"): GOOD, ("b", "x"): None}, CONDITIONS, ["x (a)"]),
        ({("a", "x"): GOOD, ("b", "x"): GOOD, ("c", "x"): WIDE}, CONDITIONS, ["x (not c)"]),
        ({}, NOT_DERIVED, []),
        ({(str(n), "x"): BAD if n < 10 else WIDE for n in range(20)}, FAILS, []),
        ({(str(n), "x"): BAD if n < 9 else WIDE for n in range(20)}, UNDECIDED, []),
        # One in twenty is what chance may do.
        ({(str(n), "x"): GOOD if n < 1 else BAD for n in range(20)}, FAILS, []),
        ({(str(n), "x"): GOOD if n < 2 else BAD for n in range(20)}, CONDITIONS, ["x (0, 1)"]),
    ],
)
def test_verdicts(cells, verdict: str, conditions: list[str]) -> None:
    findings = [Finding(row=row, column=column, estimate=found) for (row, column), found in cells.items()]
    claim = Claim(name="n", statement="s", measured="m", criterion=Criterion(1.0), findings=findings)
    assert claim.verdict == verdict and claim.conditions == conditions
