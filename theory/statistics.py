"""Intervals of shares, means and slopes over seeds."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from hetmoe.errors import InputError

CONFIDENCE = 0.95
RESAMPLES = 2000
_BOOTSTRAP = 20261128  # seed of the resampling: the same runs give the same intervals


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval.

    Attributes:
        value: of all runs.
        low: end of the interval.
        high: end of the interval.
        runs: that it is from.
    """

    value: float
    low: float
    high: float
    runs: int


def share(hits: np.ndarray) -> Estimate:
    """Of runs for which something is true, with Wilson's interval.

    Raises:
        InputError: for no runs.
    """
    values = np.asarray(hits, bool).ravel()
    if not values.size:
        raise InputError("a share of no runs")
    found = stats.binomtest(int(values.sum()), values.size).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(value=float(values.mean()), low=float(found.low), high=float(found.high), runs=values.size)


def by_seed(
    values: Float[np.ndarray, "gammas seeds *parts"],
    statistic: Callable[[Float[np.ndarray, "gammas seeds *parts"]], float],
) -> Estimate | None:
    """A statistic of runs, with the percentile interval of resampling seeds.

    A seed is resampled with its runs at all frequencies, which have the dictionary and the initial weights in common.

    Args:
        values: NaN where a run has none.
        statistic: NaN where it does not exist.

    Returns:
        None where the statistic or an end of the interval is not finite, or the statistic does not exist in more than
        a twentieth of the resamples.
    """
    draws = np.random.default_rng(_BOOTSTRAP).integers(0, values.shape[1], (RESAMPLES, values.shape[1]))
    # Medians of censored values may be infinite, or of both infinities.
    with np.errstate(invalid="ignore"):
        whole = statistic(values)
        again = np.array([statistic(values[:, draw]) for draw in draws])
        again = again[~np.isnan(again)]
        if len(again) < 0.95 * RESAMPLES:
            return None
        low, high = np.quantile(again, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if not np.isfinite([whole, low, high]).all():
        return None
    return Estimate(value=float(whole), low=float(low), high=float(high), runs=int(known_runs(values).sum()))


def known_runs(values: Float[np.ndarray, "gammas seeds *parts"]) -> Bool[np.ndarray, "gammas seeds"]:
    """Which runs have a value, in all its parts; infinite ones are values."""
    return ~np.any(np.isnan(values).reshape(*values.shape[:2], -1), axis=2)


def ratio_of_means(values: Float[np.ndarray, "gammas seeds 2"]) -> float:
    """Of the first part to the second, over all runs that have both."""
    first, second = values[known_runs(values)].sum(axis=0) if known_runs(values).any() else (np.nan, np.nan)
    return float(first / second) if second else float("nan")


def mean(values: Float[np.ndarray, "*runs"]) -> float:
    """Of all runs that have a value."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def median(values: Float[np.ndarray, "*runs"]) -> float:
    """Of all runs that have a value; infinite ones count by their sign."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else float("nan")


def log_of_mean(values: Float[np.ndarray, "*runs"]) -> float:
    """Of the mean of all runs that have a value, which may be negative; NaN unless that is positive."""
    found = mean(values)
    return float(np.log(found)) if found > 0 else float("nan")


def slope_on(
    x: Float[np.ndarray, "gammas"], centre: Callable[[Float[np.ndarray, "*runs"]], float] = mean, least: int = 3
) -> Callable[[Float[np.ndarray, "gammas seeds"]], float]:
    """The least-squares slope on x of a summary of each frequency's seeds, all frequencies alike.

    Args:
        x: one for each row of values.
        centre: `mean`, `median` or `log_of_mean`.
        least: runs that a frequency must have to count, and frequencies that there must be.
    """

    def slope(values: np.ndarray) -> float:
        rows = (~np.isnan(values)).sum(axis=1) >= least
        if rows.sum() < least:
            return float("nan")
        centres = np.array([centre(row) for row in values[rows]])
        from_mean = x[rows] - x[rows].mean()
        return float(from_mean @ centres / (from_mean @ from_mean))

    return slope


def rank_correlations(a: Float[np.ndarray, "runs n"], b: Float[np.ndarray, "runs n"]) -> Float[np.ndarray, "runs"]:
    """Spearman's correlation of every row, ties at their mean rank; NaN where one has no order."""
    ranks = [stats.rankdata(values, axis=1) for values in (a, b)]
    first, second = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    size = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return np.where(size > 0, (first * second).sum(axis=1) / np.where(size > 0, size, 1), np.nan)
