"""SiLU and its slope.

With the logistic function s, `silu(z) = z s(z)` and `silu'(z) = s(z) (1 + z (1 - s(z)))`; `silu'(-z) = 1 - silu'(z)`.
The slope's extrema are where `silu''` is 0, at z with `z tanh(z / 2) = 2`, z = +-2.39936: 1.0998394 and -0.0998394. It
rises between these two points, and falls outside.
"""

import numpy as np
from scipy.special import expit

Array = np.ndarray

STEEPEST = 1.09984  # above the slope's maximum, 1.09983932
LOWEST = -0.09984
TURN = 2.39935728  # where these are, to 1e-7: so near to an extremum the slope differs from it by less than 1e-14


def silu(z: Array) -> Array:
    """`z s(z)`."""
    return z * expit(z)


def slope(z: Array) -> Array:
    """`silu'(z)`."""
    s = expit(z)
    return s * (1 + z * (1 - s))


def steepest_within(z: Array, radius: Array) -> Array:
    """The largest `|silu'|` on `[z - radius, z + radius]`, from above.

    By the mean value theorem `|silu(z') - silu(z)|` is at most this times `|z' - z|` there. The largest magnitude is at
    one of the ends, or at an extremum inside.
    """
    low, high = z - radius, z + radius
    ends = np.maximum(np.abs(slope(low)), np.abs(slope(high))) + 1e-14  # rounding of the slope, of order 1
    # Points within 1e-6 of an extremum count as beyond it: the slope is monotonic between points that do not.
    has_top = (low <= TURN + 1e-6) & (high >= TURN - 1e-6)
    has_bottom = (low <= -TURN + 1e-6) & (high >= -TURN - 1e-6)
    inside = np.where(has_top, STEEPEST, np.where(has_bottom, -LOWEST, 0.0))
    return np.minimum(np.maximum(ends, inside), STEEPEST)
