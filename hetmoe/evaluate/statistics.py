"""Statistics over noise seeds: intervals of means and of paired differences, rank correlation."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from hetmoe.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float
    standard_error: float
    count: int


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Interval:
    """The mean and its confidence interval by Student's t.

    Args:
        values: independent measurements, one per seed.
        confidence: probability that the interval covers the mean of normal measurements.

    Raises:
        InputError: for fewer than two values, NaN, infinity, or a confidence outside (0, 1).
    """
    numbers = _numbers(values, "values")
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence!r} must be between 0 and 1")
    # Perplexities of a model that fails may be 1e304: their squares would overflow.
    unit = float(np.abs(numbers).max()) or 1.0
    scaled = numbers / unit
    mean = float(scaled.mean()) * unit
    error = float(scaled.std(ddof=1)) / math.sqrt(len(scaled)) * unit
    reach = float(stats.t.ppf((1 + confidence) / 2, len(scaled) - 1)) * error
    return Interval(mean=mean, low=mean - reach, high=mean + reach, standard_error=error, count=len(scaled))


def paired_difference(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, confidence: float = 0.95
) -> Interval:
    """The mean of `a - b` and its confidence interval, for measurements that belong together one by one.

    Raises:
        InputError: for unequal lengths, fewer than two pairs, NaN, infinity, or a confidence outside (0, 1).
    """
    left, right = _pair(a, b)
    return mean_interval(left - right, confidence)


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation; ties get their mean rank.

    Raises:
        InputError: for unequal lengths, fewer than two pairs, NaN, infinity, or values that are all equal (no order).
    """
    left, right = _pair(a, b)
    for name, values in (("a", left), ("b", right)):
        if values.min() == values.max():
            raise InputError(f"{name}: all values are {values[0]:g}; a rank correlation needs different ones")
    return float(np.corrcoef(stats.rankdata(left), stats.rankdata(right))[0, 1])


def _pair(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    left, right = _numbers(a, "a"), _numbers(b, "b")
    if len(left) != len(right):
        raise InputError(f"{len(left)} and {len(right)} values cannot be paired: give equally many")
    return left, right


def _numbers(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or len(numbers) < 2:
        raise InputError(f"{name}: shape {list(numbers.shape)}, but a list of at least two values is needed")
    if not np.isfinite(numbers).all():
        raise InputError(f"{name}: {numbers[~np.isfinite(numbers)][0]} at {int(np.argmin(np.isfinite(numbers)))}")
    return numbers
