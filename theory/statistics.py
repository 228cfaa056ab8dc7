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
        None where the statistic does not exist, or in more than a twentieth of the resamples does not.
    """
    whole = statistic(values)
    if not np.isfinite(whole):
        return None
    draws = np.random.default_rng(_BOOTSTRAP).integers(0, values.shape[1], (RESAMPLES, values.shape[1]))
    again = np.array([statistic(values[:, draw]) for draw in draws])
    again = again[np.isfinite(again)]
    if len(again) < 0.95 * RESAMPLES:
        return None
    low, high = np.quantile(again, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value=float(whole), low=float(low), high=float(high), runs=int(known_runs(values).sum()))


def known_runs(values: Float[np.ndarray, "gammas seeds *parts"]) -> Bool[np.ndarray, "gammas seeds"]:
    """Which runs have a value, in all its parts."""
    return np.all(np.isfinite(values).reshape(*values.shape[:2], -1), axis=2)


def ratio_of_means(values: Float[np.ndarray, "gammas seeds 2"]) -> float:
    """Of the first part to the second, over all runs that have both."""
    first, second = values[known_runs(values)].sum(axis=0) if known_runs(values).any() else (np.nan, np.nan)
    return float(first / second) if second else float("nan")


def mean(values: Float[np.ndarray, "gammas seeds"]) -> float:
    """Of all runs that have a value."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def slope_on(x: Float[np.ndarray, "gammas"], least: int = 3) -> Callable[[Float[np.ndarray, "gammas seeds"]], float]:
    """The least-squares slope on x of the means over seeds, all frequencies alike.

    Args:
        x: one for each row of values.
        least: runs that a frequency must have to count, and frequencies that there must be.
    """

    def slope(values: np.ndarray) -> float:
        known = np.isfinite(values)
        rows = known.sum(axis=1) >= least
        if rows.sum() < least:
            return float("nan")
        means = np.where(known, values, 0.0).sum(axis=1)[rows] / known.sum(axis=1)[rows]
        from_mean = x[rows] - x[rows].mean()
        return float(from_mean @ means / (from_mean @ from_mean))

    return slope


def rank_correlations(a: Float[np.ndarray, "runs n"], b: Float[np.ndarray, "runs n"]) -> Float[np.ndarray, "runs"]:
    """Spearman's correlation of every row, ties at their mean rank; NaN where one has no order."""
    ranks = [stats.rankdata(values, axis=1) for values in (a, b)]
    first, second = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    size = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return np.where(size > 0, (first * second).sum(axis=1) / np.where(size > 0, size, 1), np.nan)
