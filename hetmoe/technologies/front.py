"""Points that no other point beats in every respect."""

import numpy as np
from jaxtyping import Bool

from hetmoe.errors import InputError


def non_dominated(values: np.ndarray) -> Bool[np.ndarray, "points"]:
    """Which points no other dominates: none is at least as small in all columns and smaller in one. Equal ones stay.

    Args:
        values: `[points, objectives]`, all to be small.

    Raises:
        InputError: for values that are NaN, or another shape.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or np.isnan(values).any():
        raise InputError(f"values {list(values.shape)} must be numbers [points, objectives]")
    kept = np.ones(len(values), bool)
    # In lexicographic order a point can only be dominated by one before it, and by one that is itself kept.
    order = np.lexsort(values.T[::-1])
    front = np.empty((0, values.shape[1]))
    for index in order:
        point = values[index]
        beaten = ((front <= point).all(axis=1) & (front < point).any(axis=1)).any()
        kept[index] = not beaten
        if not beaten:
            front = np.vstack([front, point])
    return kept
