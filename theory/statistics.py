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


Statistic = Callable[[Float[np.ndarray, "*resamples gammas seeds"]], Float[np.ndarray, "*resamples"]]
"""Of runs; of all resamples at once."""


def by_seed(values: Float[np.ndarray, "gammas seeds *parts"], statistic: Statistic) -> Estimate | None:
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
        whole, again = statistic(values), statistic(np.moveaxis(values[:, draws], 1, 0))
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


def ratio_of_means(values: Float[np.ndarray, "*resamples gammas seeds 2"]) -> Float[np.ndarray, "*resamples"]:
    """Of the first part to the second, over all runs that have both."""
    known = ~np.isnan(values).any(axis=-1, keepdims=True)
    first, second = np.moveaxis(np.where(known, values, 0.0).sum(axis=(-3, -2)), -1, 0)
    return np.divide(first, second, out=np.full_like(first, np.nan), where=second != 0)


def mean(values: Float[np.ndarray, "*resamples gammas seeds"], axes: int = 2) -> Float[np.ndarray, "*resamples"]:
    """Over the last axes, of all runs that have a value."""
    flat = values.reshape(*values.shape[: values.ndim - axes], -1)
    known = ~np.isnan(flat)
    count, total = known.sum(axis=-1), np.where(known, flat, 0.0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def median(values: Float[np.ndarray, "*resamples gammas seeds"], axes: int = 2) -> Float[np.ndarray, "*resamples"]:
    """Over the last axes, of all runs that have a value; infinite ones count by their sign."""
    flat = np.sort(values.reshape(*values.shape[: values.ndim - axes], -1), axis=-1)  # NaN comes last
    count = (~np.isnan(flat)).sum(axis=-1, keepdims=True)
    low, high = (np.take_along_axis(flat, np.maximum(at, 0), axis=-1)[..., 0] for at in ((count - 1) // 2, count // 2))
    with np.errstate(invalid="ignore"):  # between both infinities there is nothing
        middle = np.where(low == high, low, (low + high) / 2)
    return np.where(count[..., 0] > 0, middle, np.nan)


def log_of_mean(values: Float[np.ndarray, "*resamples gammas seeds"], axes: int = 2) -> Float[np.ndarray, "*resamples"]:
    """Of the mean of all runs that have a value, which may be negative; NaN unless that is positive."""
    found = mean(values, axes)
    return np.where(found > 0, np.log(np.where(found > 0, found, 1.0)), np.nan)


def slope_on(
    x: Float[np.ndarray, "gammas"], centre: Callable[[np.ndarray, int], np.ndarray] = mean, least: int = 3
) -> Statistic:
    """The least-squares slope on x of a summary of each frequency's seeds, all frequencies alike.

    Args:
        x: one for each row of values.
        centre: `mean`, `median` or `log_of_mean`.
        least: runs that a frequency must have to count, and frequencies that there must be.
    """

    def slope(values: np.ndarray) -> np.ndarray:
        rows = (~np.isnan(values)).sum(axis=-1) >= least
        centres, count = np.where(rows, centre(values, 1), 0.0), rows.sum(axis=-1)
        middle = (rows * x).sum(axis=-1) / np.maximum(count, 1)
        from_middle = rows * (x - middle[..., None])
        spread = np.square(from_middle).sum(axis=-1)
        found = (from_middle * centres).sum(axis=-1) / np.where(spread > 0, spread, 1.0)
        return np.where((count >= least) & (spread > 0), found, np.nan)

    return slope


def rank_correlations(a: Float[np.ndarray, "runs n"], b: Float[np.ndarray, "runs n"]) -> Float[np.ndarray, "runs"]:
    """Spearman's correlation of every row, ties at their mean rank; NaN where one has no order."""
    ranks = [stats.rankdata(values, axis=1) for values in (a, b)]
    first, second = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    size = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return np.where(size > 0, (first * second).sum(axis=1) / np.where(size > 0, size, 1), np.nan)
