"""How float64 rounding enters the bounds.

Two things round. Values (activations, logits) do in both of the runs that a bound compares: an inner product of n terms
is off by at most `n u / (1 - n u)` of the sum of its terms' magnitudes, with the unit roundoff u = 2^-53 (Higham,
Accuracy and Stability of Numerical Algorithms, 3.1), which `rounding` gives for both runs together. And bounds
themselves do: they are sums and products of numbers that are not negative, which lose at most a relative u per
operation, so `widened` multiplies them once by a margin for all.
"""

from typing import TypeVar

import numpy as np

UNIT = 2.0**-53
# Sums of up to 2^20 terms and 2^10 operations after one another lose less than (2^20 + 2^10) u < 2^-32.
MARGIN = 1 + 2.0**-30

Value = TypeVar("Value", float, np.ndarray)


def rounding(terms: int, size: Value) -> Value:
    """By how much two evaluations of sums of `terms` products may differ though their operands are the same.

    Args:
        terms: of the longest sum, or of those after one another together.
        size: sum of the magnitudes of the products, or a bound of it.
    """
    # Twice for two runs, and twice for elementwise operations on the way (exponentials are within a few u).
    return size * (4 * (terms + 16) * UNIT)


def widened(bound: Value) -> Value:
    """A bound that was evaluated in float64, made one of the exact value."""
    return bound * MARGIN
